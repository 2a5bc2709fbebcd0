"""``python -m examples.hello``: register one step, ask for what it makes."""

from __future__ import annotations

from docket_celery import Graph
from examples.hello.hello_pb2 import Greeting, Name

hello = Graph("examples.hello")


@hello.step
def create_greeting(name: Name) -> Greeting:
    """Greet *name*."""
    return Greeting(message=f"Hello, {name.value}!")


def main() -> None:
    """Check the graph, run it here and now, print what came out."""
    hello.validate()
    greeting = hello.execute(Greeting, Name(value="World"))
    print(greeting.message)


if __name__ == "__main__":
    main()
