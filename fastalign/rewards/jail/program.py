"""Runs program.py as Python would, without the cost of `site`: the second argument names the folders of its packages."""

import builtins
import sys

sys.path += sys.argv[1:]
sys.argv = ["program.py"]
builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
_show = sys.excepthook
sys.excepthook = lambda kind, error, trace: _show(kind, error.with_traceback(trace and trace.tb_next), trace and trace.tb_next)
with open("program.py", encoding="utf-8") as _file:
    _code = compile(_file.read(), "program.py", "exec", dont_inherit=True)
for _name in ("sys", "builtins", "_file", "_name"):
    globals().pop(_name, None)
exec(_code)
