"""Engines that run a child: what each can express, what it loads, how fast it is. One file each."""
