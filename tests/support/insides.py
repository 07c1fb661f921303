"""
What tests look at inside of models and trainers, each in one place: users have no need of it, or what shows it to them
does more than look.
"""


def routing_of(model):
    """Which stacks answer by now. `status()` follows the folder first, and shows nothing of calls that did not."""
    return model._routing


def calls_of(model):
    """The calls under way."""
    return model._calls


def stack_of(trainer):
    """The adapters that a trainer has in memory. Those of `s3t_model` are the same, but asking for it loads some."""
    return trainer._stack


def rows_of_stages(trainer):
    """The rows that stages are trained on, as they were prepared."""
    return trainer._stage_rows


def wait_for_cleaner(model) -> None:
    """Until the table is written without deleted rows. `refresh()` waits too, and then serves what it finds."""
    model._wait_for_cleaner()


def refuse_other_recipe(trainer) -> None:
    """What `train()` asks first, without the training that follows."""
    trainer._refuse_other_recipe(True)


def wait_until_rows_are_let_go(model) -> None:
    """Until what another process deleted is out of this one's memory, which no call waits for."""
    model._letting_go.wait()
