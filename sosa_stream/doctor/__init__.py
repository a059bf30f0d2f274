"""The preflight: a few steps of a script under guard, and a list of questions answered from them.

``capture`` watches the steps, ``tape`` writes down how each loss was computed, ``replay`` computes it again on copies.
One module answers one question; ``checks`` lists them all.
"""
