"""Celery, both ends: submitting, the envelope, delivering, what a worker checks and sweeps.

The only room, with cli, testing and observe.celery_events, that knows Celery and kombu.
"""
