"""The tool of this example: a plain function. Its types and its text are what the model is told."""


def calculate(expression: str) -> str:
    """
    Multiply two whole numbers.

    Args:
        expression: The two numbers with a * between them, such as 47*85.

    Returns:
        The product.
    """
    left, _, right = expression.partition("*")
    return str(int(left) * int(right))  # what int() cannot read comes back to the model as an error
