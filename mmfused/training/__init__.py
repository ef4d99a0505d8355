"""Training behind ``mmfused train``: from a configuration to a finished run folder.

The modules in the order in which to read them:

1. ``config``: the settings of a run.
2. ``run``: ``train(config)``, from the settings to the finished folder.
3. ``loop``: steps, validation, records and checkpoints.
4. ``tasks``, ``gradients``, ``optimizer``: what one step computes.
5. ``metrics``, ``retrieval_metrics``: scores of classifiers and of retrieval models.
6. ``datasets``, ``setup``: data, tokenizer, batches and model from the settings.
7. ``checkpoint``, ``resume``, ``records``, ``signals``: stopping and resuming.
8. ``run_folder``, ``load``: writing the result, and reading it to measure a model.
9. ``ranks``: several processes that agree, stop and fail together.
10. ``folder_lock``, ``files``: one writer to a folder, atomic writes, untrusted files.
"""
