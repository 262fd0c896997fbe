"""Ask, say that the answer was bad, and ask again: with the OpenAI SDK and nothing else.

python examples/chat_with_feedback.py [--base-url http://127.0.0.1:8080/v1] [--user ada] [question]
"""

from __future__ import annotations

import argparse

from openai import OpenAI


def main() -> None:
    arguments = parse_arguments()
    # Keys are not checked in this version, but the SDK insists on one.
    client = OpenAI(base_url=arguments.base_url, api_key="unused")
    with client:
        chat(client, arguments.user, arguments.question)


def chat(client: OpenAI, user: str, question: str) -> None:
    """One conversation with a second attempt."""
    first = client.chat.completions.create(
        model="assistant", user=user, messages=[{"role": "user", "content": question}]
    )
    print(first.choices[0].message.content)

    thumb = {"completion_id": first.id, "type": "thumbs", "value": "down", "user": user}
    client.post("/feedback", body=thumb, cast_to=object)

    # The user presses "again": the link makes both answers a preference pair.
    second = client.chat.completions.create(
        model="assistant",
        user=user,
        messages=[{"role": "user", "content": question}],
        metadata={"regenerate_of": first.id},
    )
    print(second.choices[0].message.content)

    thumb = {"completion_id": second.id, "type": "thumbs", "value": "up", "user": user}
    client.post("/feedback", body=thumb, cast_to=object)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8080/v1")
    parser.add_argument("--user", default="ada")
    parser.add_argument("question", nargs="?", default="How do I water a fern?")
    return parser.parse_args()


if __name__ == "__main__":
    main()
