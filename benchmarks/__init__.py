"""What sosa_stream costs and how fast it reacts. ``make bench`` runs all and writes ``benchmarks/results/*.json``."""
