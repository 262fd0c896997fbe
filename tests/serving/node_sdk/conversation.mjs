// One conversation of everything with the official Node client, told as JSON on standard output.
// The client's module and the gateway come by environment: OPENAI_MODULE, GATEWAY, API_KEY.

const { default: OpenAI } = await import(process.env.OPENAI_MODULE);
const client = new OpenAI({ baseURL: `${process.env.GATEWAY}/v1`, apiKey: process.env.API_KEY, maxRetries: 3 });
const impatient = new OpenAI({ baseURL: `${process.env.GATEWAY}/v1`, apiKey: process.env.API_KEY, maxRetries: 0 });

const model = 'assistant';
const messages = [{ role: 'user', content: 'When do I water roses?' }];
const water = {
  type: 'function',
  function: { name: 'water', parameters: { type: 'object', properties: { plant: { type: 'string' } } } },
};

/** What a promise was refused with, as far as programs look at it. */
async function refusal(promise) {
  try {
    await promise;
  } catch (error) {
    const { status, code, type, param, requestID } = error;
    return { name: error.constructor.name, status, code, type, param, hasRequestId: Boolean(requestID) };
  }
  return null;
}

async function joined(stream, textOf) {
  const pieces = [];
  for await (const part of stream) pieces.push(textOf(part) ?? '');
  return pieces.join('');
}

async function chat() {
  const whole = await client.chat.completions.create({ model, messages, user: 'ada' });
  const stream = await client.chat.completions.create({ model, messages, stream: true });
  const called = await client.chat.completions.create({ model, messages, tools: [water], tool_choice: 'required' });
  const several = await client.chat.completions.create({ model, messages, n: 2, logprobs: true });
  return {
    id: whole.id,
    whole: whole.choices[0].message.content,
    hasRequestId: Boolean(whole._request_id),
    streamed: await joined(stream, (chunk) => chunk.choices[0]?.delta?.content),
    helper: await client.chat.completions.stream({ model, messages }).finalContent(),
    calls: called.choices[0].message.tool_calls.map((call) => call.function),
    choices: several.choices.map((choice) => choice.index),
    logprob: several.choices[1].logprobs.content[0].logprob,
    plain: (await client.completions.create({ model, prompt: 'Roses' })).choices[0].text,
  };
}

async function responses() {
  const input = 'When do I water roses?';
  const whole = await client.responses.create({ model, input });
  const stream = await client.responses.create({ model, input, stream: true });
  const streamed = await joined(stream, (event) => (event.type === 'response.output_text.delta' ? event.delta : ''));
  const again = await client.responses.retrieve(whole.id);
  await client.responses.delete(whole.id);
  const gone = await refusal(impatient.responses.retrieve(whole.id));
  return { whole: whole.output_text, streamed, again: again.output[0].content[0].text, gone };
}

async function embeddings() {
  const answer = await client.embeddings.create({ model, input: ['rose', 'fern'] });
  return answer.data.map((one) => Array.from(one.embedding));
}

async function models() {
  const names = [];
  for await (const one of client.models.list()) names.push(one.id);
  return { names, owner: (await client.models.retrieve(model)).owned_by };
}

async function stored() {
  const made = await client.chat.completions.create({ model, messages, store: true, metadata: { page: 'roses' } });
  const found = await client.chat.completions.retrieve(made.id);
  const listed = [];
  for await (const one of client.chat.completions.list({ metadata: { page: 'roses' }, limit: 1 })) listed.push(one.id);
  const asked = [];
  for await (const message of client.chat.completions.messages.list(made.id)) asked.push(message.content);
  const changed = await client.chat.completions.update(made.id, { metadata: { page: 'ferns' } });
  const { deleted } = await client.chat.completions.delete(made.id);
  const gone = await refusal(impatient.chat.completions.retrieve(made.id));
  return {
    isFound: found.id === made.id,
    isListed: listed.includes(made.id),
    asked,
    metadata: changed.metadata,
    deleted,
    gone,
  };
}

async function errors() {
  const wrongKey = new OpenAI({ baseURL: client.baseURL, apiKey: 'sk-wrong', maxRetries: 0 });
  return {
    missing: await refusal(impatient.chat.completions.create({ model: 'nobody', messages })),
    wrong: await refusal(impatient.chat.completions.create({ model, messages, temperature: 9 })),
    key: await refusal(wrongKey.models.list()),
  };
}

const parts = { chat, responses, embeddings, models, stored, errors };
const wanted = process.argv[2];
console.log(JSON.stringify(await parts[wanted]()));
