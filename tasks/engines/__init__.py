"""Engines that run a child: what each can express, what it loads, how fast it is. One file each.

What a new engine needs outside this room is listed in docs/explanation/rooms.md.
"""
