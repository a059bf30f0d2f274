"""Writes the reference of metrics: ``python -m sosa_stream.metrics > docs/metrics.md``."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from sosa_stream.metrics.catalogue import FAMILIES, LABELS, Family

GPU_JOIN = """\
label_replace(sosa_rank_info{gpu_uuid!=""}, "UUID", "$1", "gpu_uuid", "(.+)")
  * on (UUID) group_left () DCGM_FI_DEV_GPU_UTIL"""
HOST_JOIN = """\
max by (run, hostname) (sosa_rank_info)
  * on (hostname) group_left () label_replace(node_load1, "hostname", "$1", "instance", "([^:]+).*")"""

HEAD = """\
# Metrics

Written by `python -m sosa_stream.metrics`; names and labels are covered by SemVer. `GET /metrics` on `daemon.http`
exposes them as text or OpenMetrics, beside the usual `process_` metrics of the daemon.

Labels are the run and closed sets, so that the number of series does not grow with the world size. The two families
with the label `rank` are bounded: the five worst ranks of each run, if any is behind or silent for 3 s, and with
`daemon.rank_series` so many of the lowest as well. What is unknown has no sample.
"""
JOINS = f"""\
## Joins

`sosa_rank_info` says where a rank runs. The GPUs of ranks that are behind are busy to how many percent, by DCGM's
exporter:

```promql
{GPU_JOIN}
```

The load of their hosts, where node_exporter's `instance` is their name and a port:

```promql
{HOST_JOIN}
```
"""


def page() -> str:
    """The reference, in Markdown."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield HEAD
    yield from ("| name | type | labels | |", "|---|---|---|---|")
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        yield f"| {_name(family)} | {family.type} | {labels} | {family.help} |"
    yield from ("", "## Labels", "", "| label | |", "|---|---|")
    for label, meaning in LABELS.items():
        yield f"| `{label}` | {meaning} |"
    yield ""
    yield JOINS


def _name(family: Family) -> str:
    first, *others = family.sample_names
    return ", ".join([f"`{first}`", *(f"`{other.removeprefix(family.name)}`" for other in others)])


if __name__ == "__main__":
    sys.stdout.write(page())
