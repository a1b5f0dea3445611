"""What stops a run that had begun."""


class TrainingError(RuntimeError):
    """A run cannot go on (loss not finite, disk full); the message is one line and names the last whole checkpoint."""
