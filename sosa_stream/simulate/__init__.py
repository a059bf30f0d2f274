"""Synthetic ranks that drive a real daemon over real sockets: what they cost, and whether it finds their faults.

`faults` reads what is to go wrong, `course` says what every rank does at every time, `ranks` speaks for the ranks as
agents do, `senders` is the process that holds some of them, `job` runs all of it and sums it up in an `outcome`.
"""
