"""What runs look like on paper: pictures and tables for people."""
