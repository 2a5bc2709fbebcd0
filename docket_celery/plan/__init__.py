"""What a graph is: steps, their signatures and options, and the plan that leads to a target.

Pure: imports errors alone; no thread, clock, store or Celery.
"""
