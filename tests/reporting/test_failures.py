"""What a user can do something about is one line; everything else keeps its traceback."""

import threading

import pytest

from lightning_lip.errors import BoundError, UsageError
from lightning_lip.reporting.failures import check_options, told_in_one_line


def ended(error):
    def fail():
        with told_in_one_line("program"):
            raise error

    with pytest.raises(SystemExit) as stopped:
        fail()
    return stopped.value.code


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (BoundError("above"), 1, "above"),
        (UsageError("two\nlines  "), 2, "two lines"),
        (MemoryError(), 2, "out of memory"),
        (FileExistsError(17, "File exists", "file"), 2, "[Errno 17] File exists: 'file'"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_failure_is_one_line_and_a_status(capsys, error, status, line):
    assert ended(error) == status
    assert capsys.readouterr().err == f"program: {line}\n"


def test_an_interrupt_is_130(capsys):
    assert ended(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "program: interrupted.\n"


@pytest.mark.parametrize("error", [RuntimeError("a fault"), TypeError("a fault")])
def test_a_fault_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a fault"), told_in_one_line():
        raise error


@pytest.mark.parametrize(("error", "printed"), [(OSError("disk full"), False), (ValueError("a fault"), True)])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_threads_file_error_is_left_to_the_thread_that_waits_for_it(capsys, error, printed):
    def fail():
        raise error

    before = threading.excepthook
    with told_in_one_line():
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
    assert threading.excepthook is before
    assert (str(error) in capsys.readouterr().err) is printed


def command(text: str, count: int | None = None, number: float = 1.0, flag: bool = False):
    """Have options of every kind."""


@pytest.mark.parametrize(
    "options", [{"text": ""}, {"count": 3}, {"count": None}, {"number": 3}, {"number": 0.5}, {"flag": True}]
)
def test_options_of_the_right_type(options):
    check_options(command, options)


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"text": None}, "--text to be str, got None"),
        ({"count": 0.5}, "--count to be int or None, got 0.5"),
        ({"count": True}, "--count to be int or None, got True"),
        ({"number": "3"}, "--number to be float, got '3'"),
        ({"number": True}, "--number to be float, got True"),
        ({"flag": 1}, "--flag to be bool, got 1"),
    ],
)
def test_options_of_another_type(options, kind):
    with pytest.raises(UsageError, match=kind):
        check_options(command, options)
