"""A notebook as Databricks runs it: an IPython shell whose `dbutils` accepts what the real one accepts, and no more."""
import base64
import io
import json
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

LARGEST_VALUE = 48 * 1024  # bytes of the JSON of a task value
LARGEST_RESULT = 5 * 2**20  # characters of a notebook's result that are kept


class NotebookExit(BaseException):
    "Ends a notebook with a result."


class InputWidgetNotDefined(Exception): ...


def text(value, what: str) -> str:
    "The value, which must be a str."
    if type(value) is not str: raise TypeError(f"{what} must be a str, got {type(value).__name__}: {value!r}")
    return value


class Widgets:
    def __init__(self, passed: dict): self.passed, self.values = passed, {}

    def text(self, name, defaultValue, label=None):
        text(name, "the name of a widget"); text(defaultValue, "the default of a widget")
        self.values.setdefault(name, text(self.passed.get(name, defaultValue), "a parameter"))

    def get(self, name):
        if text(name, "the name of a widget") in self.values: return self.values[name]
        if name in self.passed: return self.passed[name]
        raise InputWidgetNotDefined(f"No input widget named {name} is defined")


class TaskValues:
    def __init__(self, earlier: dict): self.earlier, self.own = earlier, {}

    def set(self, key, value):
        size = len(json.dumps(value, allow_nan=False).encode())
        if size > LARGEST_VALUE: raise ValueError(f"the task value {key} has {size} bytes of JSON")
        self.own[text(key, "the key of a task value")] = value

    def get(self, taskKey, key, default=None, debugValue=None):
        values = self.earlier.get(text(taskKey, "taskKey"), {})
        if key in values: return values[key]
        if default is not None: return default
        raise ValueError(f"Task value {key} of task {taskKey} is not set")


class Notebook:
    def exit(self, value): raise NotebookExit(text(value, "the result of a notebook"))


class Jobs:
    def __init__(self, values): self.taskValues = values


class Secrets:
    def get(self, scope, key):
        from databricks.sdk import WorkspaceClient
        from databricks.sdk.errors import NotFound
        try: return base64.b64decode(WorkspaceClient().secrets.get_secret(scope, key).value).decode()
        except NotFound as error:
            raise RuntimeError(f"Secret does not exist with scope: {scope} and key: {key}") from error


class Utilities:
    "The object `dbutils`: an attribute that it does not have is an error, as for the real one."

    def __init__(self, widgets: dict, values: dict):
        self.widgets, self.jobs = Widgets(widgets), Jobs(TaskValues(values))
        self.notebook, self.secrets = Notebook(), Secrets()


def run_notebook(file: Path, folder: Path, spark, widgets: dict, values: dict) -> dict:
    "Run the cells of a notebook in `folder`; the result has `result_state`, `exit`, `values`, `message` and `cell`."
    import os

    from IPython.core.displaypub import CapturingDisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    tools, printed = Utilities(widgets, values), io.StringIO()
    shell = InteractiveShell.instance()
    shell.display_pub = CapturingDisplayPublisher(parent=shell)  # what is displayed goes to the page, not to the output
    shell.user_ns.update(dbutils=tools, spark=spark, display=print)
    shell.set_custom_exc((NotebookExit,), lambda *_, tb_offset=None: None)
    result = {"result_state": "SUCCESS", "exit": "", "message": "", "cell": None}
    with redirect_stdout(printed), redirect_stderr(printed):
        for number, cell in enumerate(json.loads(file.read_text())["cells"], 1):
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or not source.strip(): continue
            done = shell.run_cell(source)
            error = done.error_before_exec or done.error_in_exec
            if isinstance(error, NotebookExit):
                result["exit"] = str(error)[:LARGEST_RESULT]
                break
            if error:
                lines = "".join(traceback.format_exception(error))
                result |= {"result_state": "FAILED", "cell": number, "traceback": lines,
                           "message": f"{type(error).__name__}: {error}"}
                break
    return result | {"values": tools.jobs.taskValues.own, "printed": printed.getvalue()[-20_000:]}
