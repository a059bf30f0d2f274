"""Logs, other people's and our own recordings, fed to the same Engine that watches a run."""

from sosa_stream.replay.recordings import Replay, replay_recording

__all__ = ["Replay", "replay_recording"]
