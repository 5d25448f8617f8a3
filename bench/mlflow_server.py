"""Reaches the MLflow server that records and epochs go to, or says within seconds that it is away.

mlflow itself tries for many minutes to reach a server that is gone, and quotes the password of its address.
"""

from __future__ import annotations

import os
from typing import Any

from tpme.bench.errors import UserError, missing_extra

SETTINGS = {
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # else two lines for each run
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""Defaults; the environment may set others."""
FIRST_CONTACT = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
"""For the first request, in place of the defaults."""


def open_experiment(option: str, uri: str | None, experiment: str) -> tuple[Any, str]:
    """A client of the server and the id of its experiment, created where there is none.

    Args:
        option: of the command line, for messages. uri: the server; ``None``: as MLFLOW_TRACKING_URI says.

    Raises:
        UserError: mlflow is not installed, or the server does not answer or refuses.
    """
    own = {name: value for name, value in (SETTINGS | FIRST_CONTACT).items() if name not in os.environ}
    os.environ.update(own)
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise missing_extra(option, "mlflow", "mlflow") from None
    try:
        client = MlflowClient(tracking_uri=uri)
        existing = client.get_experiment_by_name(experiment)
        os.environ.update({name: SETTINGS[name] for name in own})
        home = client.create_experiment(experiment) if existing is None else existing.experiment_id
    except Exception as error:  # of mlflow; where the address is that of a database, of its driver
        if uri is None:
            raise UserError(f"{option}: {told(error)}; MLFLOW_TRACKING_URI says which server is used") from None
        raise UserError(f"{option} {uri}: {told(error)}") from None
    return client, home


def told(error: Exception) -> str:
    """What an error of mlflow says, in one line; of a request that failed, the reason alone."""
    cause = error.__context__
    if not isinstance(cause, OSError):  # as all exceptions of requests are
        return " ".join(str(error).split())
    reason = getattr(cause.args[0], "reason", cause) if cause.args else cause
    return f"the server does not answer ({str(reason).rpartition(': ')[2]})"
