"""Fields that engines know and this gateway refuses, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping

from serving.fields.nodes import Refused


def refuse(reason: str, names: str, *, may_allow: bool = True) -> dict[str, Refused]:
    """The same reason for several names."""
    return dict.fromkeys(names.split(), Refused(reason, may_allow))


ENGINE_CODE = (
    refuse("a chat template is a program that the engine runs", "chat_template chat_template_kwargs documents")
    | refuse("how a prompt is rendered is the operator's choice", "add_generation_prompt continue_final_message")
    | refuse("how a prompt is rendered is the operator's choice", "add_special_tokens")
    | refuse("a logits processor is code that the engine loads", "logits_processors vllm_xargs")
    | refuse("how media are decoded is the operator's choice", "mm_processor_kwargs media_io_kwargs mm_payload")
    | refuse("how media are decoded is the operator's choice", "return_mm_kwargs")
    | refuse("tensors from outside are not loaded", "prompt_embeds")
)
SCHEDULING = (
    refuse("the gateway sets it, so that tenants cannot see each other's cached prompts", "cache_salt", may_allow=False)
    | refuse("the gateway sets it, from the limits of the API key", "priority", may_allow=False)
    | refuse("the gateway names requests", "request_id", may_allow=False)
    | refuse("the gateway tells conversations apart", "session_id")
    | refuse("it moves cache entries between engines", "kv_transfer_params ec_transfer_params", may_allow=False)
)
SAMPLING = (
    refuse("beam search costs a multiple of the request's own work", "use_beam_search")
    | refuse("it would cut the prompt without saying so", "truncate_prompt_tokens truncation_side")
    | refuse("logprobs for a whole prompt cost the engine's memory", "prompt_logprobs logprob_token_ids")
    | refuse("it is decided for all requests alike", "watermarking repetition_detection routed_experts_prompt_start")
    | refuse("it returns what the engine made of the prompt", "return_token_ids return_tokens_as_token_ids")
    | refuse("it returns what the engine made of the prompt", "return_prompt_text return_token_offsets")
)
GRAMMARS = (
    refuse(
        "the engine no longer knows it and would ignore it; use response_format",
        "guided_json guided_regex guided_choice guided_grammar guided_decoding_backend guided_whitespace_pattern",
        may_allow=False,
    )
    | refuse("grammars and regular expressions are compiled by the engine", "regex grammar structural_tag choice")
    | refuse("grammars and regular expressions are compiled by the engine", "whitespace_pattern")
)
IN_STRUCTURED_OUTPUTS = (
    GRAMMARS
    | refuse("use response_format", "json_object")
    | refuse(
        "it is the engine's own", "_backend _backend_was_auto disable_any_whitespace disable_additional_properties"
    )
)
IN_RESPONSE_FORMAT = refuse("grammars are compiled by the engine", "format structures triggers grammar structural_tag")
NOT_AVAILABLE = refuse(
    "this gateway cannot do it", "audio prediction web_search_options functions function_call verbosity"
)
BY_ENGINES = ENGINE_CODE | SCHEDULING | SAMPLING | GRAMMARS

MEDIA = refuse(
    "this gateway passes on no media, and no addresses for the engine to fetch",
    "image_url input_image image_pil image_embeds input_audio audio audio_url audio_embeds video_url video_embeds file"
    " input_file file_id file_url file_data filename detail image document search_result source uuid data",
)
IN_CHAT_PARTS = MEDIA | refuse(
    "only text and refusals are passed on", "thinking closed name content custom prompt_cache_breakpoint"
)
IN_MESSAGES = refuse("models here answer with text and tool calls only", "audio") | refuse(
    "it belongs to a model format that is not offered", "author channel content_type recipient task tools"
)
OTHER_TOOLS = refuse("tools are functions that the client runs", "custom")
DEFERRED = refuse("tools are loaded with the request", "defer_loading")

STATE = refuse(
    "the gateway keeps no conversations; send the whole input",
    "previous_response_id conversation previous_input_messages prompt context_management",
    may_allow=False,
)
IN_RESPONSES = STATE | refuse("it returns what the engine made of the prompt", "enable_response_messages")
IN_REASONING = refuse("it is not passed on", "context mode")
BUILT_IN_TOOLS = refuse(
    "built-in tools are not available; tools are functions that the client runs",
    "web_search web_search_2025_08_26 web_search_preview web_search_preview_2025_03_11 file_search mcp code_interpreter"
    " computer computer_use_preview image_generation local_shell shell apply_patch custom namespace tool_search"
    " programmatic_tool_calling",
    may_allow=False,
)
IN_RESPONSE_TOOLS = DEFERRED | refuse(
    "it belongs to tools that are not available here",
    "action allowed_callers allowed_tools annotations async authorization background complexity connector_id container"
    " display_height display_width environment execution external_web_access filters format frame_count"
    " frame_duration_ms headers input_fidelity input_image_mask input_schema max_num_results model moderation"
    " output_compression output_format output_schema partial_images quality ranking_options require_approval"
    " search_content_types search_context_size server_description server_label server_url size svg tools tunnel_id"
    " user_location vector_store_ids",
    may_allow=False,
)
IN_RESPONSE_TOOL_CHOICE = refuse("it belongs to tools that are not available here", "mode server_label tools")
OTHER_ITEMS = refuse(
    "only messages, function calls, their outputs and reasoning can be sent back",
    "item_reference file_search_call computer_call computer_call_output web_search_call image_generation_call"
    " code_interpreter_call local_shell_call local_shell_call_output shell_call shell_call_output apply_patch_call"
    " apply_patch_call_output mcp_list_tools mcp_approval_request mcp_approval_response mcp_call custom_tool_call"
    " custom_tool_call_output tool_search_call tool_search_output compaction compaction_trigger additional_tools",
    may_allow=False,
)
IN_ITEMS = refuse(
    "it belongs to items that cannot be sent back",
    "acknowledged_safety_checks action actions approval_request_id approve async background caller code container_id"
    " created_by encrypted_content environment error execution fingerprint input max_output_length namespace operation"
    " output_format outputs pending_safety_checks quality queries reason reasoning result results revised_prompt"
    " server_label size svg_usage text tools",
    may_allow=False,
)
IN_RESPONSE_PARTS = MEDIA | refuse("it is not passed on", "prompt_cache_breakpoint")

IN_ANTHROPIC = refuse(
    "the gateway keeps no conversations and runs no tools",
    "mcp_servers container context_management",
    may_allow=False,
)
IN_BLOCKS = MEDIA | refuse("it belongs to a kind of block that is not passed on", "tool tool_name")
OTHER_BLOCKS = MEDIA | refuse(
    "tools come with the request and are run by the client",
    "tool_reference tool_addition tool_removal server_tool_use web_search_tool_result web_fetch_tool_result"
    " code_execution_tool_result mcp_tool_use mcp_tool_result container_upload",
    may_allow=False,
)

FOR_EMBEDDINGS: Mapping[str, Refused] = (
    ENGINE_CODE
    | SCHEDULING
    | refuse("embeddings are made of texts, not of conversations", "messages")
    | refuse("vectors are what OpenAI's clients can read: floats or base64", "embed_dtype endianness use_activation")
    | refuse("it would cut the text without saying so", "truncate_prompt_tokens truncation_side")
    | refuse("it is the operator's choice", "padding")
)
