"""The tasks by name."""

from peftcore_lab.tasks.task_catalogue import find, places


def test_every_task_is_named_and_described() -> None:
    for name in places():
        found = find(name)
        assert found.__doc__ and all(field.description for field in found.Data.model_fields.values())
