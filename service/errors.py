"""What a client can be told went wrong, in OpenAI's vocabulary. One tree:

ApiError
├── BadRequest          400  invalid_request, or a narrower code
│   └── ContextTooLong  400  context_length_exceeded
├── NotAuthenticated    401  invalid_api_key
├── Forbidden           403  forbidden
├── NotFound            404  not_found
│   └── ModelNotFound   404  model_not_found: also another person's version, so that nobody can ask who exists
├── Conflict            409  conflict, idempotency_conflict
├── TooLarge            413  too_large
├── RateLimited         429  rate_limit_exceeded
├── ServerFault         500  server_error
└── Unavailable         503  store_unavailable, engine_unavailable, …
"""


class ApiError(Exception):
    """Base of the tree. `retry_after` is in seconds; `retryable`: the same call may work later."""

    status = 500
    type = "server_error"
    code = "server_error"
    retryable = False

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.param = param
        self.retry_after = retry_after

    def body(self) -> dict[str, dict[str, str | None]]:
        """The body of an HTTP answer, as OpenAI's clients read it."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return {}
        return {"retry-after": str(max(1, round(self.retry_after)))}


class BadRequest(ApiError):
    status, type, code = 400, "invalid_request_error", "invalid_request"


class ContextTooLong(BadRequest):
    code = "context_length_exceeded"


class NotAuthenticated(ApiError):
    status, type, code = 401, "authentication_error", "invalid_api_key"


class Forbidden(ApiError):
    status, type, code = 403, "permission_error", "forbidden"


class NotFound(ApiError):
    status, type, code = 404, "invalid_request_error", "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"

    def __init__(self, model: str) -> None:
        super().__init__(
            f"The model {model!r} does not exist. Expected 'base', 'me' or 'me@<version>'.", param="model"
        )


class Conflict(ApiError):
    status, type, code = 409, "invalid_request_error", "conflict"


class TooLarge(ApiError):
    status, type, code = 413, "invalid_request_error", "too_large"


class RateLimited(ApiError):
    status, type, code, retryable = 429, "rate_limit_error", "rate_limit_exceeded", True


class ServerFault(ApiError):
    retryable = True


class Unavailable(ApiError):
    status, type, code, retryable = 503, "server_error", "unavailable", True
