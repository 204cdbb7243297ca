"""What an agent is asked to do. One object a task serves RL rewards, evaluation scores and demonstrations."""

from mmagent.tasks.catalogue import CATEGORIES, all_task_names, all_tasks, easy_task_names, open_tasks, task_names

__all__ = ["CATEGORIES", "all_task_names", "all_tasks", "easy_task_names", "open_tasks", "task_names"]
