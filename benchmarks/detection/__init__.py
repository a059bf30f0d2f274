"""Is every fault noticed early, and healthy training left in peace? Ours and others' rules on the same runs.

`corpus`: logs that other people wrote; `healthy` and `sick`: live programs; `spikes`: what tr8-104B and OPT told;
`others`: the rules beside us; `score`: one judge for all.
"""
