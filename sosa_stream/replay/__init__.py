"""Recordings fed to the same Engine that watched the run."""

from sosa_stream.replay.recordings import Replay, replay_recording

__all__ = ["Replay", "replay_recording"]
