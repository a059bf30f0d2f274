"""What a fix does to the training in this process, and how it is taken back."""
