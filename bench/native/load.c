/* A load generator: one thread, epoll, keep-alive connections, closed loop or open loop, whole answers or event streams.
 *
 * `@@@@@@@@` in the request becomes an eight-digit number that counts the requests; of a file of bodies each is sent in turn. Every answer's status, length and
 * ending is checked, and on demand that it answers this request and no other. Prints "ready" when the warm-up is over and one line of JSON at the end; times are microseconds.
 */
#include "common.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>

enum { MAX_MARKS = 16, MAX_BODY = 1 << 20, MAX_HEAD = 64 << 10, READ_SIZE = 256 << 10, N_STATUSES = 600, MARK_LENGTH = 8 };
#define MARK "@@@@@@@@"
#define NONCE_START "nonce-00000000" /* and the number: what the fake engine sends back */

static struct {
    int port, connections, chunks, is_stream, is_nonce_checked;
    uint64_t warmup_ns, window_ns, linger_ns, ramp_ns, timeout_ns, abandon_ns, n_numbers, seed;
    size_t min_bytes;
    double rate, abandon_share, upload_share;
    FILE *log;
    const char *host, *method, *path, *expect;
    struct buffer headers, body, lines;
    size_t line_length;
} options = {.connections = 1, .timeout_ns = 30 * NS_PER_S, .linger_ns = 5 * NS_PER_S, .window_ns = NS_PER_S, .n_numbers = 1000,
             .seed = 1, .host = "127.0.0.1", .method = "POST", .path = "/v1/chat/completions", .expect = ""};

static struct {
    struct histogram latency, first_byte, gap, refusal;
    uint64_t ok, refused, bad_status, cut, bad_body, timed_out, not_connected, unsent, abandoned, foreign, events, bytes, started;
    uint64_t statuses[N_STATUSES], stray;
} results;

static struct buffer request;
static size_t marks[MAX_MARKS];
static int n_marks, poll_fd, n_busy;
static uint64_t window_start, window_end, n_requests, random_state;

/* ---- one connection ---- */

enum state { CLOSED, CONNECTING, IDLE, SENDING, RECEIVING };
enum body_state { HEAD, BY_LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, UNTIL_CLOSE, COMPLETE };

struct client {
    struct client *next_idle;
    struct buffer head, body;
    uint64_t asked_at, last_event_at, deadline, abandon_at, start_at, number;
    size_t sent, to_send, left, scanned, line_length, body_bytes;
    int fd, status, events, is_done_event, is_closing, has_first_byte, is_measured;
    enum state state;
    enum body_state reading;
    char line[32];
};

static struct client *clients, *idle;

static uint64_t random_bits(void) { /* splitmix64 */
    uint64_t z = random_state += 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

static double random_share(void) { return (double)(random_bits() >> 11) * 0x1p-53; }

static int in_window(uint64_t at) { return at >= window_start && at < window_end; }

static void watch(struct client *client, unsigned events, int operation) {
    struct epoll_event event = {.events = events, .data.ptr = client};
    epoll_ctl(poll_fd, operation, client->fd, &event);
}

static void disconnect(struct client *client) {
    if (client->state == CLOSED) return;
    close(client->fd);
    client->state = CLOSED;
}

static void rest(struct client *client) {
    n_busy--;
    client->next_idle = idle;
    idle = client;
}

static void log_end(const struct client *client, uint64_t now, const char *how) {
    if (options.log) fprintf(options.log, "%08llu %llu %s\n", (unsigned long long)client->number, (unsigned long long)now, how);
}

static void fail_request(struct client *client, uint64_t *counter) {
    if (client->is_measured) ++*counter;
    disconnect(client);
    rest(client);
}

static void connect_client(struct client *client) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
    int yes = 1;
    inet_pton(AF_INET, options.host, &address.sin_addr);
    client->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (client->fd < 0) fail("socket");
    setsockopt(client->fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    client->state = CONNECTING;
    if (connect(client->fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) {
        fail_request(client, &results.not_connected);
        return;
    }
    watch(client, EPOLLIN | EPOLLOUT, EPOLL_CTL_ADD);
}

/* ---- sending ---- */

/* Of several bodies, the one of this request: they are equally long. */
static void choose_body(const struct client *client) {
    uint64_t n_lines = options.lines.length / (options.line_length + 1);
    const char *line = options.lines.bytes + client->number % n_lines * (options.line_length + 1);
    memcpy(request.bytes + request.length - options.line_length, line, options.line_length);
}

static void send_request(struct client *client) {
    char number[MARK_LENGTH + 1];
    if (options.lines.length) choose_body(client);
    snprintf(number, sizeof number, "%08llu", (unsigned long long)client->number % 100000000ull);
    for (int i = 0; i < n_marks; i++) memcpy(request.bytes + marks[i], number, MARK_LENGTH);
    ssize_t sent = write(client->fd, request.bytes + client->sent, client->to_send - client->sent);
    if (sent < 0 && errno != EAGAIN) {
        fail_request(client, &results.cut);
        return;
    }
    int was_waiting = client->state != IDLE;
    client->sent += sent > 0 ? (size_t)sent : 0;
    client->state = client->sent == request.length ? RECEIVING : SENDING;
    int has_more = client->state == SENDING && client->sent < client->to_send;
    if (client->state == SENDING) watch(client, EPOLLIN | (has_more ? EPOLLOUT : 0u), EPOLL_CTL_MOD);
    else if (was_waiting) watch(client, EPOLLIN, EPOLL_CTL_MOD);
}

static void begin_request(struct client *client, uint64_t at) {
    n_busy++;
    client->asked_at = at;
    client->number = n_requests++ % options.n_numbers;
    client->is_measured = options.rate > 0 ? in_window(at) : 1;
    client->deadline = at + options.timeout_ns;
    client->abandon_at = options.abandon_share > 0 && random_share() < options.abandon_share
                             ? at + (uint64_t)(random_share() * (double)options.abandon_ns) : UINT64_MAX;
    /* One that will be given up may be given up while it is still being sent. */
    client->to_send = client->abandon_at != UINT64_MAX && random_share() < options.upload_share
                          ? 1 + (size_t)(random_share() * (double)(request.length - 1)) : request.length;
    client->sent = client->head.length = client->body.length = client->scanned = client->line_length = client->body_bytes = 0;
    client->status = client->events = client->is_done_event = client->is_closing = client->has_first_byte = 0;
    client->last_event_at = 0;
    client->reading = HEAD;
    if (in_window(at)) results.started++;
    if (client->state == CLOSED) connect_client(client);
    else send_request(client);
}

/* ---- receiving ---- */

static void note_event(struct client *client, uint64_t now) {
    client->events++;
    if (client->last_event_at && in_window(now)) record(&results.gap, now - client->last_event_at);
    client->last_event_at = now;
}

static void scan_events(struct client *client, uint64_t now) {
    char *text = client->body.bytes, *end = text + client->body.length, *line = text + client->scanned, *stop;
    for (; line < end && (stop = memchr(line, '\n', (size_t)(end - line))); line = stop + 1) {
        if (stop - line < 7 || memcmp(line, "data: ", 6)) continue;
        if (!memcmp(line, "data: [DONE]", 12)) client->is_done_event = 1;
        else note_event(client, now);
    }
    client->scanned = (size_t)(line - text);
}

static void take_body(struct client *client, const char *bytes, size_t length, uint64_t now) {
    client->body_bytes += length;
    if (!client->has_first_byte && length) {
        client->has_first_byte = 1;
        if (client->status == 200 && in_window(now)) record(&results.first_byte, now - client->asked_at);
    }
    if (client->body.length + length <= MAX_BODY) append(&client->body, bytes, length);
    if (options.is_stream) scan_events(client, now);
}

static int64_t header_number(const char *head, const char *name) {
    const char *found = strcasestr(head, name);
    return found ? atoll(found + strlen(name)) : -1;
}

static void read_head(struct client *client) {
    append(&client->head, "", 1);
    const char *head = client->head.bytes;
    int64_t length = header_number(head, "\r\ncontent-length:");
    client->status = client->head.length > 12 ? atoi(head + 9) : 0;
    client->is_closing = strcasestr(head, "\r\nconnection: close") != NULL;
    if (client->status / 100 == 1) {
        client->head.length = 0;
        return;
    }
    if (strcasestr(head, "\r\ntransfer-encoding: chunked")) client->reading = CHUNK_SIZE;
    else if (length >= 0) client->reading = length ? BY_LENGTH : COMPLETE;
    else client->reading = UNTIL_CLOSE;
    client->left = length > 0 ? (size_t)length : 0;
}

static size_t take_head(struct client *client, const char *bytes, size_t length) {
    size_t before = client->head.length, from = before > 3 ? before - 3 : 0;
    append(&client->head, bytes, length);
    char *end = memmem(client->head.bytes + from, client->head.length - from, "\r\n\r\n", 4);
    if (!end) return length;
    size_t taken = (size_t)(end + 4 - client->head.bytes) - before;
    client->head.length = before + taken;
    read_head(client);
    return taken;
}

/* A line of the chunked encoding: a size, the end of a chunk, or a trailer. */
static size_t take_line(struct client *client, const char *bytes, size_t length) {
    const char *stop = memchr(bytes, '\n', length);
    size_t part = stop ? (size_t)(stop - bytes) : length, room = sizeof client->line - 1 - client->line_length;
    memcpy(client->line + client->line_length, bytes, part < room ? part : room);
    client->line_length += part < room ? part : room;
    if (!stop) return length;
    client->line[client->line_length] = 0;
    int is_empty = client->line_length == 0 || client->line[0] == '\r';
    client->line_length = 0;
    if (client->reading == TRAILER) {
        if (is_empty) client->reading = COMPLETE;
    } else if (client->reading == CHUNK_END) {
        client->reading = CHUNK_SIZE;
    } else {
        client->left = strtoul(client->line, NULL, 16);
        client->reading = client->left ? CHUNK_DATA : TRAILER;
    }
    return part + 1;
}

static size_t take_counted(struct client *client, const char *bytes, size_t length, uint64_t now) {
    size_t taken = length < client->left ? length : client->left;
    take_body(client, bytes, taken, now);
    client->left -= taken;
    if (client->left == 0) client->reading = client->reading == BY_LENGTH ? COMPLETE : CHUNK_END;
    return taken;
}

static size_t take_some(struct client *client, const char *bytes, size_t length, uint64_t now) {
    switch (client->reading) {
        case HEAD: return take_head(client, bytes, length);
        case BY_LENGTH:
        case CHUNK_DATA: return take_counted(client, bytes, length, now);
        case CHUNK_SIZE:
        case CHUNK_END:
        case TRAILER: return take_line(client, bytes, length);
        case UNTIL_CLOSE: take_body(client, bytes, length, now); return length;
        case COMPLETE: break;
    }
    results.stray++; /* bytes after the end of an answer */
    return length;
}

/* Whether every nonce in the answer is this request's, and there is one. */
static int is_own_answer(const struct client *client) {
    char own[32];
    int length = snprintf(own, sizeof own, NONCE_START "%08llu", (unsigned long long)client->number % 100000000ull), n_found = 0;
    const char *at = client->body.bytes, *end = at + client->body.length;
    for (; at < end && (at = memmem(at, (size_t)(end - at), "nonce-", 6)); at += length, n_found++)
        if (end - at < length || memcmp(at, own, (size_t)length)) return 0;
    return n_found > 0;
}

static int is_whole_answer(const struct client *client) {
    if (options.is_stream) return client->is_done_event && client->events >= options.chunks;
    if (client->body_bytes < options.min_bytes) return 0;
    return !*options.expect || memmem(client->body.bytes, client->body.length, options.expect, strlen(options.expect)) != NULL;
}

static void judge(struct client *client, uint64_t now) {
    if (client->status > 0 && client->status < N_STATUSES && in_window(now)) results.statuses[client->status]++;
    int counts = options.rate > 0 ? client->is_measured : in_window(now);
    uint64_t took = now - client->asked_at;
    if (client->status == 429 || client->status == 503 || client->status == 408) { /* the last is vllm-router's */
        if (!counts) return;
        results.refused++;
        record(&results.refusal, took);
    } else if (client->status / 100 != 2) {
        results.bad_status += counts;
    } else if (!is_whole_answer(client)) {
        results.bad_body += counts;
    } else if (options.is_nonce_checked && !is_own_answer(client)) {
        results.foreign++;
    } else {
        log_end(client, now, "ok");
        if (counts) record(&results.latency, took);
        if (!in_window(now)) return;
        results.ok++;
        results.events += (uint64_t)client->events;
        results.bytes += client->body_bytes;
    }
}

static void end_answer(struct client *client, uint64_t now) {
    judge(client, now);
    if (client->is_closing || client->reading == UNTIL_CLOSE) disconnect(client);
    else client->state = IDLE;
    rest(client);
}

static void receive(struct client *client) {
    static char bytes[READ_SIZE];
    ssize_t n = read(client->fd, bytes, sizeof bytes);
    if (n < 0 && errno == EAGAIN) return;
    uint64_t now = now_ns();
    if (client->state == IDLE) { /* the server closed a connection that had nothing to do, or talks out of turn */
        results.stray += n > 0;
        disconnect(client);
        return;
    }
    if (n <= 0) {
        if (n == 0 && client->reading == UNTIL_CLOSE) end_answer(client, now);
        else fail_request(client, client->state == CONNECTING ? &results.not_connected : &results.cut);
        return;
    }
    for (size_t at = 0; at < (size_t)n;) {
        at += take_some(client, bytes + at, (size_t)n - at, now);
        if (client->head.length > MAX_HEAD) fail("answer head");
    }
    if (client->reading == COMPLETE) end_answer(client, now);
}

static void handle(struct client *client, unsigned events) {
    if (client->state == CLOSED) return;
    if (client->state == CONNECTING && events & EPOLLOUT && !(events & (EPOLLERR | EPOLLHUP))) send_request(client);
    else if (client->state == SENDING && events & EPOLLOUT) send_request(client);
    if (client->state != CLOSED && events & (EPOLLIN | EPOLLERR | EPOLLHUP)) receive(client);
}

/* ---- loops ---- */

static void sweep(uint64_t now) {
    for (int i = 0; i < options.connections; i++) {
        struct client *client = &clients[i];
        if (client->state == CLOSED || client->state == IDLE) continue;
        if (now >= client->abandon_at) {
            log_end(client, now_ns(), client->sent < request.length ? "upload" : client->has_first_byte ? "stream" : "waiting");
            fail_request(client, &results.abandoned);
        } else if (now >= client->deadline) fail_request(client, &results.timed_out);
    }
}

static struct client *take_idle(void) {
    struct client *client = idle;
    if (client) idle = client->next_idle;
    return client;
}

/* The clients that are through ask again at once; at the start they come one after the other over the ramp. */
static uint64_t start_closed(uint64_t now) {
    struct client *rested = idle, *client;
    uint64_t due = UINT64_MAX;
    idle = NULL;
    while ((client = rested)) {
        rested = client->next_idle;
        if (client->start_at <= now) {
            begin_request(client, now);
            continue;
        }
        if (client->start_at < due) due = client->start_at;
        client->next_idle = idle;
        idle = client;
    }
    return due;
}

static uint64_t start_open(uint64_t now) {
    static uint64_t next;
    if (!next) next = now;
    for (; next <= now && next < window_end; next += (uint64_t)(-log(1.0 - random_share()) / options.rate * 1e9)) {
        struct client *client = take_idle();
        if (client) begin_request(client, next);
        else results.unsent += in_window(next);
    }
    return next;
}

static void run(void) {
    struct epoll_event events[1024];
    uint64_t start = now_ns(), next_sweep = start, sweep_every = (options.abandon_share > 0 ? 2 : 50) * NS_PER_MS;
    int is_ready = 0;
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    window_start = start + options.warmup_ns;
    window_end = window_start + options.window_ns;
    for (uint64_t now = start; now < window_end || (options.rate > 0 && n_busy && now < window_end + options.linger_ns);) {
        uint64_t due = UINT64_MAX;
        if (now < window_end) due = options.rate > 0 ? start_open(now) : start_closed(now);
        if (now >= next_sweep) sweep(now), next_sweep = now + sweep_every;
        if (next_sweep < due) due = next_sweep;
        now = now_ns();
        int n = wait_for_events(poll_fd, events, 1024, due > now ? (int64_t)(due - now) : 0);
        for (int i = 0; i < n; i++) handle(events[i].data.ptr, events[i].events);
        now = now_ns();
        if (!is_ready && now >= window_start) is_ready = puts("ready"), fflush(stdout);
    }
}

static void print_results(void) {
    double seconds = (double)options.window_ns / 1e9;
    const char *separator = "";
    printf("{\"seconds\": %.3f, \"ok\": %llu, \"per_s\": %.2f, \"started\": %llu, \"refused\": %llu, \"bad_status\": %llu, \"cut\": %llu, "
           "\"bad_body\": %llu, \"foreign\": %llu, \"timed_out\": %llu, \"not_connected\": %llu, \"unsent\": %llu, \"abandoned\": %llu, \"stray\": %llu, "
           "\"unfinished\": %d, \"events\": %llu, \"bytes\": %llu, \"statuses\": {",
           seconds, (unsigned long long)results.ok, (double)results.ok / seconds, (unsigned long long)results.started,
           (unsigned long long)results.refused, (unsigned long long)results.bad_status, (unsigned long long)results.cut,
           (unsigned long long)results.bad_body, (unsigned long long)results.foreign, (unsigned long long)results.timed_out, (unsigned long long)results.not_connected,
           (unsigned long long)results.unsent, (unsigned long long)results.abandoned, (unsigned long long)results.stray,
           options.rate > 0 ? n_busy : 0, (unsigned long long)results.events, (unsigned long long)results.bytes);
    for (int status = 0; status < N_STATUSES; status++) {
        if (!results.statuses[status]) continue;
        printf("%s\"%d\": %llu", separator, status, (unsigned long long)results.statuses[status]);
        separator = ", ";
    }
    printf("}, ");
    print_histogram("latency", &results.latency);
    printf(", ");
    print_histogram("first_byte", &results.first_byte);
    printf(", ");
    print_histogram("gap", &results.gap);
    printf(", ");
    print_histogram("refusal", &results.refusal);
    printf("}\n");
}

/* ---- preparation ---- */

static void read_whole(const char *path, struct buffer *into) {
    char bytes[4096];
    FILE *file = fopen(path, "r");
    if (!file) fail(path);
    for (size_t n; (n = fread(bytes, 1, sizeof bytes, file)) > 0;) append(into, bytes, n);
    fclose(file);
}

/* A body per line, all of one length: request k sends line k modulo their number. */
static void read_lines(const char *path) {
    read_whole(path, &options.lines);
    const char *end = options.lines.length ? memchr(options.lines.bytes, '\n', options.lines.length) : NULL;
    if (!end) fail("--bodies: no line");
    options.line_length = (size_t)(end - options.lines.bytes);
    if (options.lines.length % (options.line_length + 1)) fail("--bodies: lines of different lengths");
    append(&options.body, options.lines.bytes, options.line_length);
}

static void build_request(void) {
    char line[1024];
    snprintf(line, sizeof line, "%s %s HTTP/1.1\r\nhost: %s:%d\r\n", options.method, options.path, options.host, options.port);
    append(&request, line, strlen(line));
    if (options.headers.length) append(&request, options.headers.bytes, options.headers.length);
    if (options.body.length) {
        snprintf(line, sizeof line, "content-type: application/json\r\ncontent-length: %zu\r\n", options.body.length);
        append(&request, line, strlen(line));
    }
    append(&request, "\r\n", 2);
    if (options.body.length) append(&request, options.body.bytes, options.body.length);
    for (char *at = request.bytes, *end = at + request.length; n_marks < MAX_MARKS; at += MARK_LENGTH) {
        at = memmem(at, (size_t)(end - at), MARK, MARK_LENGTH);
        if (!at) break;
        marks[n_marks++] = (size_t)(at - request.bytes);
    }
}

static uint64_t nanoseconds(const char *seconds) { return (uint64_t)(atof(seconds) * 1e9); }

static void read_options(int argc, char **argv) {
    static const struct option names[] = {
        {"host", 1, 0, 'h'}, {"port", 1, 0, 'p'}, {"connections", 1, 0, 'c'}, {"seconds", 1, 0, 's'}, {"warmup", 1, 0, 'w'},
        {"rate", 1, 0, 'r'}, {"linger", 1, 0, 'l'}, {"ramp", 1, 0, 'R'}, {"timeout", 1, 0, 't'}, {"stream", 1, 0, 'S'},
        {"min-bytes", 1, 0, 'm'}, {"expect", 1, 0, 'e'}, {"header", 1, 0, 'H'}, {"body", 1, 0, 'b'}, {"method", 1, 0, 'M'},
        {"path", 1, 0, 'P'}, {"numbers", 1, 0, 'n'}, {"seed", 1, 0, 'x'}, {"abandon", 1, 0, 'a'}, {"abandon-within", 1, 0, 'A'},
        {"abandon-upload", 1, 0, 'u'}, {"check-nonce", 0, 0, 'N'}, {"log", 1, 0, 'o'}, {"first-number", 1, 0, 'f'}, {"bodies", 1, 0, 'B'}, {0, 0, 0, 0}};
    for (int name; (name = getopt_long(argc, argv, "", names, NULL)) >= 0;) switch (name) {
        case 'h': options.host = optarg; break;
        case 'p': options.port = atoi(optarg); break;
        case 'c': options.connections = atoi(optarg); break;
        case 's': options.window_ns = nanoseconds(optarg); break;
        case 'w': options.warmup_ns = nanoseconds(optarg); break;
        case 'r': options.rate = atof(optarg); break;
        case 'l': options.linger_ns = nanoseconds(optarg); break;
        case 'R': options.ramp_ns = nanoseconds(optarg); break;
        case 't': options.timeout_ns = nanoseconds(optarg); break;
        case 'S': options.is_stream = 1; options.chunks = atoi(optarg); break;
        case 'm': options.min_bytes = strtoul(optarg, NULL, 10); break;
        case 'e': options.expect = optarg; break;
        case 'H': append(&options.headers, optarg, strlen(optarg)); append(&options.headers, "\r\n", 2); break;
        case 'b': read_whole(optarg, &options.body); break;
        case 'B': read_lines(optarg); break;
        case 'M': options.method = optarg; break;
        case 'P': options.path = optarg; break;
        case 'n': options.n_numbers = strtoull(optarg, NULL, 10); break;
        case 'x': options.seed = strtoull(optarg, NULL, 10); break;
        case 'a': options.abandon_share = atof(optarg); break;
        case 'u': options.upload_share = atof(optarg); break;
        case 'N': options.is_nonce_checked = 1; break;
        case 'o': if (!(options.log = fopen(optarg, "w"))) fail(optarg); break;
        case 'f': n_requests = strtoull(optarg, NULL, 10); break;
        case 'A': options.abandon_ns = nanoseconds(optarg); break;
        default: exit(2);
    }
    if (options.connections < 1 || options.n_numbers < 1) fail("--connections and --numbers");
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    prepare_process();
    build_request();
    random_state = options.seed;
    clients = allocate(NULL, sizeof *clients * (size_t)options.connections);
    memset(clients, 0, sizeof *clients * (size_t)options.connections);
    uint64_t start = now_ns();
    for (int i = options.connections - 1; i >= 0; i--) {
        clients[i].start_at = start + options.ramp_ns * (uint64_t)i / (uint64_t)options.connections;
        clients[i].next_idle = idle;
        idle = &clients[i];
    }
    run();
    print_results();
}
