"""The unmodified SDKs of OpenAI and Anthropic against the gateway: nothing but the base URL is theirs to know."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import anthropic
import openai
import pytest
from anthropic.types import MessageParam, TextBlock
from openai.types.chat import (
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionMessageParam,
    ChatCompletionToolUnionParam,
)
from pydantic import BaseModel

from pawl import ids
from tests.serving.conftest import Served
from tests.serving.keyed import keyed_gateway

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


TOOL: ChatCompletionToolUnionParam = {
    "type": "function",
    "function": {"name": "water", "parameters": {"type": "object", "properties": {"plant": {"type": "string"}}}},
}


class Advice(BaseModel):
    """An answer by a schema."""

    when: str


def test_tools(sdk: openai.OpenAI, served: Served) -> None:
    completion = sdk.chat.completions.create(model="assistant", messages=MESSAGES, tools=[TOOL], tool_choice="required")
    choice = completion.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    call = choice.message.tool_calls[0]
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert (call.function.name, call.function.arguments) == ("water", '{"plant": "fern"}')
    assert served.engine.seen[-1]["tools"] == [TOOL]
    follow_up: list[ChatCompletionMessageParam] = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call.model_dump()]},  # type: ignore[list-item]
        {"role": "tool", "tool_call_id": call.id, "content": "watered"},
    ]
    answer = sdk.chat.completions.create(model="assistant", messages=follow_up, tools=[TOOL])
    assert answer.choices[0].message.content == served.engine.behaviour.text


def test_tools_streamed(sdk: openai.OpenAI) -> None:
    with sdk.chat.completions.stream(
        model="assistant", messages=MESSAGES, tools=[TOOL], tool_choice="required"
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    assert message.tool_calls[0].function.arguments == '{"plant": "fern"}'


def test_several_choices_and_logprobs(sdk: openai.OpenAI) -> None:
    completion = sdk.chat.completions.create(model="assistant", messages=MESSAGES, n=3, logprobs=True)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    logprobs = completion.choices[2].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert logprobs.content[0].logprob == -0.5


def test_an_answer_by_a_schema(sdk: openai.OpenAI, served: Served) -> None:
    served.engine.behaviour.text = '{"when": "in the morning"}'
    completion = sdk.chat.completions.parse(model="assistant", messages=MESSAGES, response_format=Advice)
    assert completion.choices[0].message.parsed == Advice(when="in the morning")
    assert served.engine.seen[-1]["response_format"]["type"] == "json_schema"


def test_responses(sdk: openai.OpenAI, served: Served) -> None:
    response = sdk.responses.create(model="assistant", input="When do I water roses?", metadata={"page": "roses"})
    assert response.output_text == served.engine.behaviour.text
    assert ids.completion_suffix(response.id) is not None
    served.stored(response.id)
    assert sdk.responses.retrieve(response.id).output_text == response.output_text
    sdk.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        sdk.responses.retrieve(response.id)


def test_responses_streamed(sdk: openai.OpenAI, served: Served) -> None:
    events = list(sdk.responses.create(model="assistant", input="When do I water roses?", stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == (
        served.engine.behaviour.text
    )
    last = events[-1]
    assert last.type == "response.completed"
    stored = served.stored(last.response.id)
    assert stored.completion is not None
    assert stored.completion["content"] == served.engine.behaviour.text
    with sdk.responses.stream(model="assistant", input="When do I water roses?") as stream:
        assert stream.get_final_response().output_text == served.engine.behaviour.text


def test_embeddings(sdk: openai.OpenAI) -> None:
    """The SDK asks for base64 by itself."""
    answer = sdk.embeddings.create(model="assistant", input=["rose", "fern"])
    assert [one.embedding for one in answer.data] == [[0.25, -0.5, 0.75]] * 2
    plain = sdk.embeddings.create(model="assistant", input="rose", encoding_format="float")
    assert plain.data[0].embedding == [0.25, -0.5, 0.75]
    assert plain.usage.prompt_tokens == 7


def test_stored_completions(sdk: openai.OpenAI, served: Served) -> None:
    ada = sdk.with_options(default_headers={"x-pawl-user": "sdk-ada"})
    made = [
        ada.chat.completions.create(model="assistant", messages=MESSAGES, store=True, metadata={"n": str(n)})
        for n in range(3)
    ]
    for completion in made:
        served.stored(completion.id)
    found = ada.chat.completions.retrieve(made[0].id)
    assert found.choices[0].message.content == made[0].choices[0].message.content
    assert [one.id for one in ada.chat.completions.list(limit=2)] == [one.id for one in made]
    assert [one.id for one in ada.chat.completions.list(metadata={"n": "1"})] == [made[1].id]
    [message] = ada.chat.completions.messages.list(made[0].id)
    assert message.content == MESSAGES[0]["content"]
    ada.chat.completions.update(made[0].id, metadata={"n": "9"})
    assert [one.id for one in ada.chat.completions.list(metadata={"n": "9"})] == [made[0].id]
    assert ada.chat.completions.delete(made[0].id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        ada.chat.completions.retrieve(made[0].id)
    assert gone.value.code == "completion_not_found"


def test_a_completion_can_be_read_as_soon_as_it_is_there(sdk: openai.OpenAI) -> None:
    """Records travel to the database behind the answers: the client waits and asks again by itself where it must."""
    patient = sdk.with_options(max_retries=5)
    made = patient.chat.completions.create(model="assistant", messages=MESSAGES)
    assert patient.chat.completions.retrieve(made.id).id == made.id


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


def test_errors_of_the_younger_routes(sdk: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        sdk.responses.create(model="nobody", input="x")
    assert (missing.value.code, missing.value.type) == ("model_not_found", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):
        sdk.embeddings.create(model="nobody", input="x")


def test_keys_and_limits_raise_the_classes_clients_expect(tmp_path: Path) -> None:
    with keyed_gateway(tmp_path, ["infer", "feedback"], requests_per_minute=1) as (served, keys):
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="sk-wrong", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError) as refused:
                wrong.chat.completions.create(model="assistant", messages=MESSAGES)
            assert refused.value.code == "invalid_api_key"
        with (
            openai.OpenAI(base_url=f"{served.url}/v1", api_key=keys["feedback"], max_retries=0) as other,
            pytest.raises(openai.PermissionDeniedError) as forbidden,
        ):
            other.chat.completions.create(model="assistant", messages=MESSAGES)
        assert forbidden.value.type == "permission_error"
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key=keys["infer"], max_retries=0) as limited:
            raw = limited.chat.completions.with_raw_response.create(model="assistant", messages=MESSAGES)
            assert raw.headers["x-ratelimit-limit-requests"] == "1"
            with pytest.raises(openai.RateLimitError) as slow:
                limited.chat.completions.create(model="assistant", messages=MESSAGES)
            assert slow.value.type == "rate_limit_error"
            assert slow.value.response.headers["retry-after"]
            assert slow.value.request_id


def test_the_anthropic_sdk(served: Served) -> None:
    asked: list[MessageParam] = [{"role": "user", "content": "When do I water roses?"}]
    with anthropic.Anthropic(base_url=served.url, api_key="unused", max_retries=0, timeout=20) as sdk:
        message = sdk.messages.create(model="assistant", max_tokens=64, messages=asked)
        assert isinstance(message.content[0], TextBlock)
        assert message.content[0].text == served.engine.behaviour.text
        assert (message.stop_reason, message.usage.output_tokens) == ("end_turn", 5)
        with sdk.messages.stream(model="assistant", max_tokens=64, messages=asked) as stream:
            assert stream.get_final_text() == served.engine.behaviour.text
        stored = served.stored(message.id)
        assert stored.route == "messages"
        assert stored.completion is not None
        assert stored.completion["content"] == served.engine.behaviour.text
        with pytest.raises(anthropic.NotFoundError):
            sdk.messages.create(model="nobody", max_tokens=64, messages=asked)
        with pytest.raises(anthropic.BadRequestError):
            sdk.messages.create(model="assistant", max_tokens=0, messages=asked)


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
