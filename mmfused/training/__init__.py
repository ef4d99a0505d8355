"""Training, as run by ``mmfused train``.

The modules, in a good order for reading:

1. ``config``, ``recipes``: the settings of a run, and those that the papers give.
2. ``run``: ``train(config)``, which makes a finished run from the settings.
3. ``loop``: the training loop.
4. ``tasks``, ``gradients``, ``optimizer``: the computation of one step.
5. ``metrics``, ``retrieval_metrics``, ``pair_metrics``, ``search``: scores of classifiers and of
   retrieval models.
6. ``datasets``, ``initial``, ``setup``: the data, tokenizer, model and batches that the settings
   describe.
7. ``checkpoint``, ``resume``, ``records``, ``signals``: stopping and resuming.
8. ``run_folder``, ``load``: writing the result, and loading a trained model.
9. ``ranks``: several processes that stop and fail together.
10. ``folder_lock``, ``files``: the lock on a run's folder, atomic writes, untrusted files.
"""
