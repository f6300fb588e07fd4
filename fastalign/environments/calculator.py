"""A calculator that the model calls in the middle of what it writes."""

from __future__ import annotations

from .expressions import calculate

HOLE = "{}"  # where a template's call or result goes


class Calculator:
    """Answers calls such as `<tool>12*7</tool>` with `<result>84</result>`; a turn without a call is the last one.

    The last call of a turn counts. One that cannot be computed is answered by what is wrong with it.

    Args:
        call: how the model calls it, with {} for the expression; `\\n` is a line's end.
        result: how it answers, with {} for the value.

    Raises:
        ValueError: a template without its {}, or a call with nothing behind it that would end the turn.
    """

    immediate, gives_reward = True, False

    def __init__(self, *, call: str = "<tool>{}</tool>", result: str = "<result>{}</result>") -> None:
        call, self.result = call.replace("\\n", "\n"), result.replace("\\n", "\n")
        for name, template in (("call", call), ("result", self.result)):
            if template.count(HOLE) != 1:
                raise ValueError(f"{name}={template!r}: expected one {{}} in it, as in <tool>{{}}</tool>")
        self.begin, _, self.end = call.partition(HOLE)
        if not self.begin or not self.end:
            raise ValueError(f"call={call!r}: expected text before and behind the {{}}, as in <tool>{{}}</tool>")
        self.stop = (self.end,)

    def reset(self) -> None:
        """It has no state."""

    def step(self, text: str) -> tuple[str | None, None, bool]:
        _, found, rest = text.rpartition(self.begin)
        expression, ended, _ = rest.partition(self.end)
        if not found or not ended:
            return None, None, True
        try:
            value = calculate(expression)
        except (ValueError, ZeroDivisionError) as error:
            value = "error: division by zero" if isinstance(error, ZeroDivisionError) else f"error: {error}"
        return self.result.replace(HOLE, value), None, False
