/* A fake inference engine: one thread, epoll, answers chat completions as fast or as slowly as it is told.
 *
 * Whole answers are JSON with a length; with "stream":true in the body they are server-sent events in HTTP chunks. Like
 * vLLM it makes the completion's id from X-Request-Id, and stops working when the client leaves. A text `nonce-` and 16
 * characters in a request comes back in every piece of its answer.
 */
#include "common.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <getopt.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

enum { MAX_PIECES = 4096, MAX_PATCHES = 2 * MAX_PIECES + 2, MAX_REQUEST = 16 << 20, ID_SIZE = 128, READ_SIZE = 64 << 10 };
#define NONCE_MARK "nonce-"
enum { NONCE_LENGTH = 22 };
static const char NO_NONCE[] = "water-it-in-the-mornin";

static struct {
    int port, chunks, chunk_bytes, answer_bytes, is_written_singly, fail_every, limit;
    uint64_t gap_ns, service_ns;
    const char *models;
    FILE *log;
} options = {.chunks = 64, .chunk_bytes = 250, .answer_bytes = 1024, .models = "base-model"};

static struct {
    uint64_t accepted, requests, answered, aborted, failed;
    int open, running, waiting;
} stats;

/* ---- answers: made once for each length of id, then only the ids and nonces change ---- */

struct patch {
    size_t at;
    int is_nonce;
};

struct answer {
    struct buffer text;
    size_t id_length, starts[MAX_PIECES + 1];
    int n_pieces, n_patches, first_patches[MAX_PIECES + 1];
    struct patch patches[MAX_PATCHES];
};

static struct answer whole, stream, stream_with_usage;

static void add(struct answer *answer, const char *text) { append(&answer->text, text, strlen(text)); }

static void add_filler(struct answer *answer, int length) {
    static const char words[] = "the roses in the morning and the ferns at night, ";
    for (int i = 0; i < length; i++) append(&answer->text, &words[(size_t)i % (sizeof words - 1)], 1);
}

static void add_patch(struct answer *answer, int is_nonce, size_t length) {
    answer->patches[answer->n_patches++] = (struct patch){answer->text.length, is_nonce};
    for (size_t i = 0; i < length; i++) add(answer, "x");
}

static void end_piece(struct answer *answer) {
    answer->starts[++answer->n_pieces] = answer->text.length;
    answer->first_patches[answer->n_pieces] = answer->n_patches;
}

static void begin_answer(struct answer *answer, size_t id_length) {
    answer->text.length = 0;
    answer->id_length = id_length;
    answer->n_pieces = answer->n_patches = 0;
}

static void add_id(struct answer *answer, const char *object) {
    add(answer, "{\"id\":\"chatcmpl-");
    add_patch(answer, 0, answer->id_length);
    add(answer, "\",\"object\":\"");
    add(answer, object);
    add(answer, "\",\"created\":1770000000,\"model\":\"base-model\",\"choices\":[");
}

static void build_whole(struct answer *answer, size_t id_length) {
    static const char before[] = "{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"";
    static const char after[] = "\",\"refusal\":null,\"tool_calls\":[]},\"logprobs\":null,\"finish_reason\":\"stop\"}],"
                                "\"usage\":{\"prompt_tokens\":180,\"total_tokens\":308,\"completion_tokens\":128}}";
    char head[160];
    for (int size = 0, length = 0; size < 2; size++) { /* the second time with the length that the first found */
        begin_answer(answer, id_length);
        snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nserver: fake\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n", length);
        add(answer, head);
        size_t body = answer->text.length;
        add_id(answer, "chat.completion");
        add(answer, before);
        add_patch(answer, 1, NONCE_LENGTH);
        int filler = options.answer_bytes - (int)(answer->text.length - body) - (int)sizeof after + 1;
        add_filler(answer, filler > 0 ? filler : 0);
        add(answer, after);
        length = (int)(answer->text.length - body);
    }
    end_piece(answer);
}

/* The size line of an HTTP chunk comes before what it counts: six digits are kept free for it. */
static size_t begin_http_chunk(struct answer *answer) {
    size_t at = answer->text.length;
    add(answer, "000000\r\n");
    return at;
}

static void end_http_chunk(struct answer *answer, size_t at) {
    char size[8];
    snprintf(size, sizeof size, "%06x", (unsigned)(answer->text.length - at - 8) & 0xffffffu);
    memcpy(answer->text.bytes + at, size, 6);
    add(answer, "\r\n");
}

static void add_event(struct answer *answer, int index, int is_last) {
    static const char after[] = "\"},\"logprobs\":null,\"finish_reason\":null}]}\n\n";
    size_t at = begin_http_chunk(answer);
    add(answer, "data: ");
    add_id(answer, "chat.completion.chunk");
    add(answer, index ? "{\"index\":0,\"delta\":{\"content\":\"" : "{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"");
    add_patch(answer, 1, NONCE_LENGTH);
    int filler = options.chunk_bytes - (int)(answer->text.length - at - 8) - (int)sizeof after + 1;
    add_filler(answer, filler > 0 ? filler : 0);
    add(answer, is_last ? "\"},\"logprobs\":null,\"finish_reason\":\"stop\"}]}\n\n" : after);
    end_http_chunk(answer, at);
}

static void build_stream(struct answer *answer, size_t id_length, int wants_usage) {
    begin_answer(answer, id_length);
    add(answer, "HTTP/1.1 200 OK\r\nserver: fake\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                "cache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n");
    for (int i = 0; i < options.chunks; i++) {
        add_event(answer, i, i == options.chunks - 1);
        if (i < options.chunks - 1) end_piece(answer);
    }
    if (wants_usage) { /* with the last chunk, so that pacing is the same with and without */
        size_t at = begin_http_chunk(answer);
        add(answer, "data: ");
        add_id(answer, "chat.completion.chunk");
        add(answer, "],\"usage\":{\"prompt_tokens\":180,\"total_tokens\":308,\"completion_tokens\":128}}\n\n");
        end_http_chunk(answer, at);
    }
    size_t at = begin_http_chunk(answer);
    add(answer, "data: [DONE]\n\n");
    end_http_chunk(answer, at);
    add(answer, "0\r\n\r\n");
    end_piece(answer);
}

/* ---- connections ---- */

enum state { RECEIVING, WAITING, SERVING, STREAMING };
enum fault { NO_FAULT, FAULT_STATUS, FAULT_CUT, FAULT_EVENT };

struct connection {
    struct connection *before, *after;
    struct queue *queue;
    struct buffer in, out;
    size_t request_length, id_length;
    uint64_t due, began;
    int fd, next_piece, is_stream, wants_usage, is_closing, is_dead, has_nonce;
    enum state state;
    enum fault fault;
    char id[ID_SIZE], nonce[NONCE_LENGTH + 1];
};

/* Every wait of one kind is equally long, so a queue in order of arrival is in order of time too. */
struct queue {
    struct connection *first, *last;
};

static struct queue waiting, in_service, in_gap, graveyard;
static int poll_fd;

static void join(struct queue *queue, struct connection *connection) {
    connection->queue = queue;
    connection->after = NULL;
    connection->before = queue->last;
    if (queue->last) queue->last->after = connection;
    else queue->first = connection;
    queue->last = connection;
}

static void leave(struct connection *connection) {
    struct queue *queue = connection->queue;
    if (!queue) return;
    if (connection->before) connection->before->after = connection->after;
    else queue->first = connection->after;
    if (connection->after) connection->after->before = connection->before;
    else queue->last = connection->before;
    connection->queue = NULL;
}

static void start(struct connection *connection);

static void release_slot(void) {
    stats.running--;
    struct connection *next = waiting.first;
    if (!next) return;
    leave(next);
    stats.waiting--;
    start(next);
}

static void log_end(const struct connection *connection, const char *how) {
    if (!options.log || !connection->has_nonce) return;
    fprintf(options.log, "%s %llu %llu %s\n", connection->nonce, (unsigned long long)connection->began,
            (unsigned long long)now_ns(), how);
}

/* The memory goes when this turn's events are through, since one of them may name it. */
static void drop(struct connection *connection) {
    if (connection->is_dead) return;
    connection->is_dead = 1;
    enum state state = connection->state;
    leave(connection);
    close(connection->fd);
    stats.open--;
    join(&graveyard, connection);
    if (state != RECEIVING) {
        stats.aborted++;
        log_end(connection, "gone");
    }
    if (state == WAITING) stats.waiting--;
    if (state == SERVING || state == STREAMING) release_slot();
}

static void bury(void) {
    while (graveyard.first) {
        struct connection *connection = graveyard.first;
        leave(connection);
        free(connection->in.bytes);
        free(connection->out.bytes);
        free(connection);
    }
}

static void watch(struct connection *connection, int is_blocked) {
    struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP | (is_blocked ? EPOLLOUT : 0u), .data.ptr = connection};
    epoll_ctl(poll_fd, EPOLL_CTL_MOD, connection->fd, &event);
}

static void send_bytes(struct connection *connection, const char *bytes, size_t length) {
    if (connection->is_dead) return;
    ssize_t sent = 0;
    if (connection->out.length == 0) {
        sent = write(connection->fd, bytes, length);
        if (sent < 0 && errno != EAGAIN) {
            drop(connection);
            return;
        }
        if (sent < 0) sent = 0;
    }
    if ((size_t)sent == length) return;
    if (connection->out.length == 0) watch(connection, 1);
    append(&connection->out, bytes + sent, length - (size_t)sent);
}

static void flush_out(struct connection *connection) {
    ssize_t sent = write(connection->fd, connection->out.bytes, connection->out.length);
    if (sent < 0) {
        if (errno != EAGAIN) drop(connection);
        return;
    }
    consume(&connection->out, (size_t)sent);
    if (connection->out.length) return;
    watch(connection, 0);
    if (connection->is_closing && connection->state == RECEIVING) drop(connection);
}

static void send_pieces(struct connection *connection, struct answer *answer, int from, int to) {
    for (int i = answer->first_patches[from]; i < answer->first_patches[to]; i++) {
        struct patch *patch = &answer->patches[i];
        char *place = answer->text.bytes + patch->at;
        if (patch->is_nonce) memcpy(place, connection->has_nonce ? connection->nonce : NO_NONCE, NONCE_LENGTH);
        else memcpy(place, connection->id, connection->id_length);
    }
    if (!options.is_written_singly) {
        send_bytes(connection, answer->text.bytes + answer->starts[from], answer->starts[to] - answer->starts[from]);
        return;
    }
    for (int i = from; i < to; i++)
        send_bytes(connection, answer->text.bytes + answer->starts[i], answer->starts[i + 1] - answer->starts[i]);
}

static struct answer *answer_for(const struct connection *connection) {
    struct answer *answer = !connection->is_stream ? &whole : connection->wants_usage ? &stream_with_usage : &stream;
    if (answer->n_pieces && answer->id_length == connection->id_length) return answer;
    if (connection->is_stream) build_stream(answer, connection->id_length, connection->wants_usage);
    else build_whole(answer, connection->id_length);
    return answer;
}

static void finish(struct connection *connection) {
    if (connection->is_dead) return;
    stats.answered++;
    log_end(connection, "done");
    connection->state = RECEIVING;
    consume(&connection->in, connection->request_length);
    release_slot();
    if (connection->is_closing && connection->out.length == 0) drop(connection);
}

static void send_plain(struct connection *connection, const char *status, const char *body) {
    char head[256];
    snprintf(head, sizeof head, "HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %zu\r\n\r\n", status, strlen(body));
    send_bytes(connection, head, strlen(head));
    send_bytes(connection, body, strlen(body));
}

static void send_fault(struct connection *connection) {
    static const char event[] = "data: {\"error\": {\"message\": \"EngineCore died\", \"type\": \"InternalServerError\", \"code\": 500}}\n\n"
                                "data: [DONE]\n\n";
    char size[16];
    stats.failed++;
    if (connection->fault == FAULT_STATUS) {
        send_plain(connection, "500 Internal Server Error",
                   "{\"error\":{\"message\":\"EngineCore died\",\"type\":\"InternalServerError\",\"code\":500}}");
    } else if (connection->fault == FAULT_EVENT) {
        snprintf(size, sizeof size, "%zx\r\n", sizeof event - 1);
        send_bytes(connection, size, strlen(size));
        send_bytes(connection, event, sizeof event - 1);
        send_bytes(connection, "\r\n0\r\n\r\n", 7);
    } else {
        connection->is_closing = 1; /* the connection ends in the middle of the answer */
    }
    finish(connection);
}

static void send_next(struct connection *connection) {
    struct answer *answer = answer_for(connection);
    int from = connection->next_piece, to = options.gap_ns ? from + 1 : answer->n_pieces;
    if (connection->fault == FAULT_STATUS || (connection->fault && from >= answer->n_pieces / 2)) {
        send_fault(connection);
        return;
    }
    if (connection->fault && to > answer->n_pieces / 2) to = answer->n_pieces / 2;
    send_pieces(connection, answer, from, to);
    if (connection->is_dead) return;
    connection->next_piece = to;
    if (to == answer->n_pieces) {
        finish(connection);
        return;
    }
    connection->state = STREAMING;
    connection->due = (connection->due ? connection->due : now_ns()) + options.gap_ns;
    join(&in_gap, connection);
}

static void start(struct connection *connection) {
    stats.running++;
    connection->state = SERVING;
    connection->due = options.service_ns ? now_ns() + options.service_ns : 0;
    if (options.service_ns) join(&in_service, connection);
    else send_next(connection);
}

/* ---- requests ---- */

static const char *header_value(const char *head, const char *end, const char *name, size_t *length) {
    size_t name_length = strlen(name);
    for (const char *line = memchr(head, '\n', (size_t)(end - head)); line && ++line < end;
         line = memchr(line, '\n', (size_t)(end - line))) {
        if ((size_t)(end - line) <= name_length || strncasecmp(line, name, name_length) || line[name_length] != ':') continue;
        const char *value = line + name_length + 1;
        while (*value == ' ') value++;
        const char *stop = memchr(value, '\r', (size_t)(end - value));
        *length = (size_t)((stop ? stop : end) - value);
        return value;
    }
    return NULL;
}

static int holds(const char *text, size_t length, const char *wanted) {
    return memmem(text, length, wanted, strlen(wanted)) != NULL;
}

static void read_fields(struct connection *connection, const char *head, size_t head_length, const char *body, size_t length) {
    static uint64_t n_made;
    const char *nonce = memmem(body, length, NONCE_MARK, strlen(NONCE_MARK));
    const char *id = header_value(head, head + head_length, "x-request-id", &connection->id_length);
    connection->is_stream = holds(body, length, "\"stream\":true") || holds(body, length, "\"stream\": true");
    connection->wants_usage = holds(body, length, "\"include_usage\":true") || holds(body, length, "\"include_usage\": true");
    connection->has_nonce = nonce && (size_t)(body + length - nonce) >= NONCE_LENGTH;
    if (connection->has_nonce) memcpy(connection->nonce, nonce, NONCE_LENGTH);
    if (id && connection->id_length < ID_SIZE) memcpy(connection->id, id, connection->id_length);
    else connection->id_length = (size_t)snprintf(connection->id, ID_SIZE, "bench-%026llu", (unsigned long long)n_made++);
}

static void complete(struct connection *connection, const char *head, size_t head_length, const char *body, size_t length) {
    read_fields(connection, head, head_length, body, length);
    stats.requests++;
    connection->began = now_ns();
    connection->next_piece = 0;
    connection->due = 0;
    connection->fault = NO_FAULT;
    if (options.fail_every && stats.requests % (uint64_t)options.fail_every == 0)
        connection->fault = connection->is_stream ? (enum fault)(1 + stats.requests / (uint64_t)options.fail_every % 3) : FAULT_STATUS;
    if (options.limit && stats.running >= options.limit) {
        connection->state = WAITING;
        stats.waiting++;
        join(&waiting, connection);
    } else {
        start(connection);
    }
}

static void send_models(struct connection *connection) {
    char body[4096], names[1024];
    size_t length = (size_t)snprintf(body, sizeof body, "{\"object\":\"list\",\"data\":[");
    snprintf(names, sizeof names, "%s", options.models);
    for (char *name = strtok(names, ","); name && length < sizeof body - 512; name = strtok(NULL, ","))
        length += (size_t)snprintf(body + length, sizeof body - length,
                                   "%s{\"id\":\"%s\",\"object\":\"model\",\"created\":1770000000,\"owned_by\":\"vllm\","
                                   "\"root\":\"%s\",\"parent\":null,\"max_model_len\":32768}",
                                   body[length - 1] == '[' ? "" : ",", name, name);
    snprintf(body + length, sizeof body - length, "]}");
    send_plain(connection, "200 OK", body);
}

static void send_stats(struct connection *connection) {
    char body[512];
    if (options.log) fflush(options.log);
    snprintf(body, sizeof body,
             "{\"accepted\":%llu,\"requests\":%llu,\"answered\":%llu,\"aborted\":%llu,\"failed\":%llu,\"open\":%d,"
             "\"running\":%d,\"waiting\":%d}",
             (unsigned long long)stats.accepted, (unsigned long long)stats.requests, (unsigned long long)stats.answered,
             (unsigned long long)stats.aborted, (unsigned long long)stats.failed, stats.open, stats.running, stats.waiting);
    send_plain(connection, "200 OK", body);
}

static void send_get(struct connection *connection, const char *head) {
    if (!strncmp(head, "GET /health ", 12)) send_plain(connection, "200 OK", "");
    else if (!strncmp(head, "GET /v1/models ", 15)) send_models(connection);
    else if (!strncmp(head, "GET /stats ", 11)) send_stats(connection);
    else send_plain(connection, "404 Not Found", "{\"detail\":\"Not Found\"}");
    if (!connection->is_dead) consume(&connection->in, connection->request_length);
}

/* Take one whole request from what came; 0 when there is none. */
static int take_request(struct connection *connection) {
    if (connection->in.length == 0) return 0; /* before the first byte there is no buffer to look into */
    const char *head = connection->in.bytes, *end = memmem(head, connection->in.length, "\r\n\r\n", 4);
    size_t length = 0, value_length = 0;
    if (!end) {
        if (connection->in.length > 64 << 10) drop(connection);
        return 0;
    }
    size_t head_length = (size_t)(end + 4 - head);
    const char *value = header_value(head, end, "content-length", &value_length);
    if (value) length = strtoul(value, NULL, 10);
    if (header_value(head, end, "transfer-encoding", &value_length) || length > MAX_REQUEST) {
        send_plain(connection, "411 Length Required", "{}");
        drop(connection);
        return 0;
    }
    if (connection->in.length < head_length + length) return 0;
    value = header_value(head, end, "connection", &value_length);
    connection->is_closing = value && value_length == 5 && !strncasecmp(value, "close", 5);
    connection->request_length = head_length + length;
    if (!strncmp(head, "POST /v1/", 9)) complete(connection, head, head_length, head + head_length, length);
    else send_get(connection, head);
    return 1;
}

static void receive(struct connection *connection) {
    static char bytes[READ_SIZE];
    ssize_t n = read(connection->fd, bytes, sizeof bytes);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        drop(connection);
        return;
    }
    append(&connection->in, bytes, (size_t)n);
    while (!connection->is_dead && connection->state == RECEIVING && take_request(connection)) {}
}

static void accept_all(int listener) {
    for (int fd; (fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0;) {
        int yes = 1;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
        struct connection *connection = allocate(NULL, sizeof *connection);
        memset(connection, 0, sizeof *connection);
        connection->fd = fd;
        stats.accepted++;
        stats.open++;
        struct epoll_event event = {.events = EPOLLIN | EPOLLRDHUP, .data.ptr = connection};
        epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event);
    }
}

/* A request that followed another on its connection waits until that one is answered, which time may have done. */
static void answer_due(struct queue *queue, uint64_t now) {
    while (queue->first && queue->first->due <= now) {
        struct connection *connection = queue->first;
        leave(connection);
        send_next(connection);
        while (!connection->is_dead && connection->state == RECEIVING && take_request(connection)) {}
    }
}

static int64_t until_due(uint64_t now) {
    uint64_t due = UINT64_MAX;
    if (in_service.first) due = in_service.first->due;
    if (in_gap.first && in_gap.first->due < due) due = in_gap.first->due;
    return due == UINT64_MAX ? -1 : due > now ? (int64_t)(due - now) : 0;
}

static int listen_on(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), yes = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 8192)) fail("listen");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    epoll_ctl(poll_fd, EPOLL_CTL_ADD, listener, &event);
    return listener;
}

static void handle(struct connection *connection, unsigned events) {
    if (!connection->is_dead && events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) receive(connection);
    if (!connection->is_dead && events & EPOLLOUT && connection->out.length) flush_out(connection);
}

static void run(void) {
    struct epoll_event events[512];
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    int listener = listen_on(options.port);
    puts("listening");
    fflush(stdout);
    for (;;) {
        int n = wait_for_events(poll_fd, events, 512, until_due(now_ns()));
        for (int i = 0; i < n; i++) {
            if (events[i].data.ptr) handle(events[i].data.ptr, events[i].events);
            else accept_all(listener);
        }
        uint64_t now = now_ns();
        answer_due(&in_service, now);
        answer_due(&in_gap, now);
        bury();
    }
}

static void read_options(int argc, char **argv) {
    static const struct option names[] = {
        {"port", 1, 0, 'p'}, {"chunks", 1, 0, 'c'}, {"chunk-bytes", 1, 0, 'b'}, {"answer-bytes", 1, 0, 'a'}, {"gap-us", 1, 0, 'g'},
        {"service-us", 1, 0, 's'}, {"limit", 1, 0, 'l'}, {"fail-every", 1, 0, 'f'}, {"models", 1, 0, 'm'}, {"log", 1, 0, 'o'},
        {"written-singly", 0, 0, 'w'}, {0, 0, 0, 0}};
    for (int name; (name = getopt_long(argc, argv, "", names, NULL)) >= 0;) switch (name) {
        case 'p': options.port = atoi(optarg); break;
        case 'c': options.chunks = atoi(optarg); break;
        case 'b': options.chunk_bytes = atoi(optarg); break;
        case 'a': options.answer_bytes = atoi(optarg); break;
        case 'g': options.gap_ns = strtoull(optarg, NULL, 10) * NS_PER_US; break;
        case 's': options.service_ns = strtoull(optarg, NULL, 10) * NS_PER_US; break;
        case 'l': options.limit = atoi(optarg); break;
        case 'f': options.fail_every = atoi(optarg); break;
        case 'm': options.models = optarg; break;
        case 'o': if (!(options.log = fopen(optarg, "w"))) fail(optarg); break;
        case 'w': options.is_written_singly = 1; break;
        default: exit(2);
    }
    if (options.chunks < 1 || options.chunks > MAX_PIECES - 1) fail("--chunks");
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    prepare_process();
    run();
}
