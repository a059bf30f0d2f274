"""The demo: one small training run three times, clean, with faults, and with the same faults and sosa."""
