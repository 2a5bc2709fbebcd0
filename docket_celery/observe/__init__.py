"""What a run tells: events as they happen. Listeners cannot change or break a run.

Listeners import observe.events alone.
"""
