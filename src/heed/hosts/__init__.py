"""Models of other libraries as hosts: one way to take part in their attention, wherever they compute it."""
