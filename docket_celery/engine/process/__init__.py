"""What a process has once: settings, pool, timer, loops, heartbeat, hooks, limits, instances.

Made on first use in each process, never across a fork; imports what engine may.
"""
