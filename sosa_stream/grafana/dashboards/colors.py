"""Colours that people with any kind of colour vision tell apart; none is the only bearer of what it says.

They are those of Okabe and Ito (Color Universal Design, 2008), and a grey.
"""

from __future__ import annotations

BLUE, SKY, GREEN, YELLOW = "#0072B2", "#56B4E9", "#009E73", "#F0E442"
ORANGE, VERMILLION, PURPLE, GREY = "#E69F00", "#D55E00", "#CC79A7", "#999999"
HEALTHY, NOTE, WARNING, CRITICAL, UNKNOWN = BLUE, SKY, ORANGE, VERMILLION, GREY

PALETTE = frozenset({BLUE, SKY, GREEN, YELLOW, ORANGE, VERMILLION, PURPLE, GREY})
SEVERITIES = {"critical": CRITICAL, "warning": WARNING, "info": NOTE}
RANK_STATES = {
    "live": HEALTHY,
    "stale": WARNING,
    "gil_held_or_stopped": CRITICAL,
    "lost": CRITICAL,
    "blind": WARNING,
    "ended": UNKNOWN,
}
PHASES = {
    "start": GREY,
    "data": ORANGE,
    "forward": SKY,
    "backward": BLUE,
    "optimizer": GREEN,
    "eval": YELLOW,
    "checkpoint": PURPLE,
    "end": GREY,
}
COMMAND_STATES = {
    "proposed": GREY,
    "approved": GREY,
    "published": SKY,
    "held": SKY,
    "committed": YELLOW,
    "applied": BLUE,
    "verified": GREEN,
    "reverted": ORANGE,
    "rejected": VERMILLION,
    "expired": VERMILLION,
    "aborted": VERMILLION,
}
VERDICTS = {"helped": BLUE, "inconclusive": GREY, "no_effect": ORANGE, "harmed": VERMILLION, "not_applied": PURPLE}
MEMORY = {"host max": BLUE, "host mean": SKY, "device max": VERMILLION, "device mean": ORANGE}
