"""Evaluation: one harness for a local checkpoint and for any OpenAI-compatible endpoint.

From the command line: ``python -m evals SUITE... --checkpoint DIR`` (``--help`` says the rest). As functions::

    suite = SUITES["miniwob"]()                                     # evals.suites
    run = evaluate_now(suite, LocalAgent.load(folder), out, Options(limit=20))    # evals.runner, evals.local
    summarise(run.rows).score                                       # evals.summary
    write_report([run], out / "report.html")                        # evals.report.runs

In training: :class:`evals.hook.EvaluationHook`. A suite of one's own is a :class:`evals.suite.Suite` around tasks
(`mmagent.protocols.Task`); who is judged is anything with the two methods of :class:`evals.suite.Agent`.

What keeps scores honest: prompt, image geometry, judge, action frame, limits and code version are pinned in
``run.json``; a run made otherwise is neither resumed nor compared. An error is no zero: it is counted apart.
"""
