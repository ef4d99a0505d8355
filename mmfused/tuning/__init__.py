"""``mmfused tune``: find plans that are faster than the library's own on a user's GPU.

:mod:`.candidates` names the alternatives of a plan, :mod:`.search` picks among them with times of
:mod:`.timing`, and :mod:`.verify` refuses those with wrong results. :mod:`.calls` and
:mod:`.compile` find candidates that need not run, without a GPU. :mod:`.command` is the command.
"""
