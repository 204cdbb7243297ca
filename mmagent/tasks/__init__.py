"""What an agent is asked to do. One object a task serves RL rewards, evaluation scores and demonstrations."""

from mmagent.tasks.catalogue import all_task_names, easy_task_names, open_tasks

__all__ = ["all_task_names", "easy_task_names", "open_tasks"]
