"""A reward that takes its rank down, as a fault of the program would."""


def reward(*_args: object, **_kwargs: object) -> float:
    raise SystemError("deliberate crash")
