"""A Django project with a Celery app, as its users write them; processes of their own import it."""
