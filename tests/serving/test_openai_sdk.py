"""The unmodified OpenAI SDK against the gateway."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from pawl import ids
from tests.serving.conftest import Served

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "When do I water roses?"}]


@pytest.fixture
def sdk(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=20) as sdk:
        yield sdk


def test_whole(sdk: openai.OpenAI, served: Served) -> None:
    completion = sdk.chat.completions.create(model="assistant", messages=MESSAGES, user="ada")
    assert completion.choices[0].message.content == served.engine.behaviour.text
    assert completion.usage is not None
    assert completion.usage.total_tokens == 12
    assert completion._request_id == str(ids.completion_suffix(completion.id))[:32]


def test_streaming(sdk: openai.OpenAI, served: Served) -> None:
    chunks = list(sdk.chat.completions.create(model="assistant", messages=MESSAGES, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == served.engine.behaviour.text
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_streaming_with_usage(sdk: openai.OpenAI) -> None:
    *_, last = sdk.chat.completions.create(
        model="assistant", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    assert last.usage is not None
    assert last.usage.completion_tokens == 5


def test_the_stream_helper(sdk: openai.OpenAI, served: Served) -> None:
    with sdk.chat.completions.stream(model="assistant", messages=MESSAGES) as stream:
        assert stream.get_final_completion().choices[0].message.content == served.engine.behaviour.text


async def test_async(served: Served) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as sdk:
        whole = await sdk.chat.completions.create(model="assistant", messages=MESSAGES)
        stream = await sdk.chat.completions.create(model="assistant", messages=MESSAGES, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert whole.choices[0].message.content == text == served.engine.behaviour.text


def test_raw_response(sdk: openai.OpenAI) -> None:
    raw = sdk.chat.completions.with_raw_response.create(model="assistant", messages=MESSAGES)
    assert raw.headers["x-pawl-variant"] == "control"
    assert raw.headers["x-pawl-feedback-token"]
    assert raw.parse().id.startswith("chatcmpl-")


def test_plain_completions(sdk: openai.OpenAI, served: Served) -> None:
    completion = sdk.completions.create(model="assistant", prompt="Roses")
    assert completion.choices[0].text == served.engine.behaviour.text
    assert completion.id.startswith("cmpl-")


def test_models(sdk: openai.OpenAI) -> None:
    assert [model.id for model in sdk.models.list()] == ["assistant"]
    assert sdk.models.retrieve("assistant").owned_by == "pawl"
    with pytest.raises(openai.NotFoundError):
        sdk.models.retrieve("nobody")


def test_errors_raise_the_classes_clients_expect(sdk: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.chat.completions.create(model="nobody", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    assert missing.value.request_id
    with pytest.raises(openai.BadRequestError) as wrong:
        sdk.chat.completions.create(model="assistant", messages=MESSAGES, temperature=9)
    assert wrong.value.param == "temperature"
    served.engine.behaviour.status = 400
    served.engine.behaviour.error = {"error": {"message": "This model's maximum context length is 64 tokens."}}
    with pytest.raises(openai.BadRequestError) as overflow:
        sdk.chat.completions.create(model="assistant", messages=MESSAGES)
    assert overflow.value.code == "context_length_exceeded"
    served.engine.behaviour.status = 500
    with pytest.raises(openai.InternalServerError):
        sdk.chat.completions.create(model="assistant", messages=MESSAGES)


def test_an_error_in_mid_stream_raises(sdk: openai.OpenAI, served: Served) -> None:
    served.engine.behaviour.break_after = 2
    stream = sdk.chat.completions.create(model="assistant", messages=MESSAGES, stream=True)
    assert next(stream).choices[0].delta.role == "assistant"
    assert next(stream).choices[0].delta.content
    with pytest.raises(openai.APIError, match="broke off"):
        next(stream)


def test_feedback_by_completion_id(sdk: openai.OpenAI, served: Served) -> None:
    completion = sdk.chat.completions.create(model="assistant", messages=MESSAGES, user="ada")
    served.stored(completion.id)
    body = {"completion_id": completion.id, "type": "thumbs", "value": "up", "user": "ada"}
    answer = sdk.post("/feedback", body=body, cast_to=object)
    assert isinstance(answer, dict)
    assert answer["object"] == "feedback"
    with pytest.raises(openai.NotFoundError):
        sdk.post("/feedback", body={**body, "user": "eve"}, cast_to=object)


def test_regeneration_by_metadata(sdk: openai.OpenAI, served: Served) -> None:
    first = sdk.chat.completions.create(model="assistant", messages=MESSAGES, user="ada")
    second = sdk.chat.completions.create(
        model="assistant", messages=MESSAGES, user="ada", metadata={"regenerate_of": first.id}
    )
    assert served.stored(second.id).regenerate_of == ids.completion_suffix(first.id)
