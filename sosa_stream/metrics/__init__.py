"""What Prometheus scrapes: every family (`catalogue`), and how a snapshot becomes samples (`collector`)."""
