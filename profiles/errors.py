"""What is wrong with a profile."""


class ProfileError(Exception):
    """A profile that cannot be used: one readable message, every problem on its own line."""
