"""What the solver's process runs: a problem from stdin, its solution to stdout, until stdin ends.

It is started by its path and imports nothing but the solver: it is ready in a tenth of a second.
"""

from __future__ import annotations

import os

from ortools.math_opt import callback_pb2, rpc_pb2
from ortools.math_opt.core.python import solver

LENGTH_BYTES = 8
"""Before each message: how long it is."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # HiGHS writes remarks to standard output
    with os.fdopen(0, "rb") as requests:
        while len(length := requests.read(LENGTH_BYTES)) == LENGTH_BYTES:
            request = rpc_pb2.SolveRequest.FromString(requests.read(int.from_bytes(length)))
            answer = _answer(request).SerializeToString()
            answers.write(len(answer).to_bytes(LENGTH_BYTES) + answer)
            answers.flush()


def _answer(request: rpc_pb2.SolveRequest) -> rpc_pb2.SolveResponse:
    try:
        result = solver.solve(
            request.model,
            request.solver_type,
            request.initializer,
            request.parameters,
            request.model_parameters,
            None,
            callback_pb2.CallbackRegistrationProto(),
            None,
            None,
        )
    except Exception as error:
        return rpc_pb2.SolveResponse(status=rpc_pb2.StatusProto(code=1, message=str(error)))
    return rpc_pb2.SolveResponse(result=result)


if __name__ == "__main__":
    main()
