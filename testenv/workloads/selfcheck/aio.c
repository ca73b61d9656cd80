// aioring: contexts of asynchronous I/O (io_setup(2)), by their system calls:
// empty ones, some with events that nobody has read yet, full ones, some whose
// head and tail went around, and one that tells of events by an eventfd. Their
// rings are read as libraries do, with the eyes of user space.
// aiobusy: a request that does not end. aiochild: the ring of a parent.
#include "selfcheck.h"
#include <linux/aio_abi.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>

struct ring {
	unsigned id, nr, head, tail, magic, compat, incompat, header;
	struct io_event events[];
};

static int ai_submit(aio_context_t c, struct iocb *b) { return syscall(SYS_io_submit, c, 1L, &b); }
static int ai_get(aio_context_t c, long min, long nr, struct io_event *e) {
	struct timespec now = {0, 0};
	return syscall(SYS_io_getevents, c, min, nr, e, &now);
}

enum { AI_EMPTY, AI_FEW, AI_FULL, AI_AROUND, AI_BIG, AI_NOTIFY, AI_MOVED, AI_COUNT };
static struct {
	aio_context_t ctx;
	struct ring *ring;
	unsigned nr, head, tail, pending;
	uint64_t sent, got; // numbers of events
} ai[AI_COUNT];
static char ai_data[8192];
static int ai_file, ai_event;

// ai_send makes requests of which the results can be told apart.
static unsigned ai_send(int i, unsigned n) {
	unsigned k = 0;
	for (; k < n; k++) {
		uint64_t no = ai[i].sent;
		struct iocb b = {.aio_data = (uint64_t)i << 32 | no, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = ai_file,
			.aio_buf = (uint64_t)ai_data, .aio_nbytes = 1 + no % 4096};
		if (i == AI_NOTIFY) {
			b.aio_flags = IOCB_FLAG_RESFD;
			b.aio_resfd = ai_event;
		}
		int r = ai_submit(ai[i].ctx, &b);
		if (r < 0 && errno == EAGAIN) break;
		CHECK(r == 1, "io_submit to context %d: %d, %s", i, r, strerror(errno));
		ai[i].sent++;
	}
	return k;
}

// ai_take reads n events, which must be the next ones.
static void ai_take(int i, unsigned n) {
	struct io_event e[64];
	while (n > 0) {
		unsigned k = n < 64 ? n : 64;
		int r = ai_get(ai[i].ctx, k, k, e);
		CHECK(r == (int)k, "context %d gave %d of %u events: %s", i, r, k, strerror(errno));
		for (unsigned j = 0; j < k; j++) {
			CHECK(e[j].data == ((uint64_t)i << 32 | ai[i].got), "context %d: event %lx, want number %lu", i, (long)e[j].data, ai[i].got);
			CHECK(e[j].res == (int64_t)(1 + ai[i].got % 4096), "context %d: result %ld of event %lu", i, (long)e[j].res, ai[i].got);
			ai[i].got++;
		}
		n -= k;
	}
	if (i == AI_NOTIFY) {
		uint64_t told;
		CHECK(SYS(read(ai_event, &told, sizeof told)) == sizeof told, "read of the eventfd");
	}
}

static void ai_note(int i) {
	ai[i].head = ai[i].ring->head;
	ai[i].tail = ai[i].ring->tail;
	ai[i].pending = ai[i].sent - ai[i].got;
}

static void ai_look(int i) {
	struct ring *r = ai[i].ring;
	CHECK(r->magic == 0xa10a10a1 && r->nr == ai[i].nr, "context %d: ring of %u events, magic %x", i, r->nr, r->magic);
	CHECK(r->head == ai[i].head && r->tail == ai[i].tail, "context %d: head %u and tail %u, were %u and %u", i, r->head, r->tail, ai[i].head, ai[i].tail);
	for (unsigned k = 0; k < ai[i].pending; k++) {
		struct io_event *e = &r->events[(r->head + k) % r->nr];
		CHECK(e->data == ((uint64_t)i << 32 | (ai[i].got + k)), "context %d: event %u of the ring is %lx", i, k, (long)e->data);
	}
}

static void ai_check(void) {
	static int turn;
	for (int i = 0; i < AI_COUNT; i++) ai_look(i);
	struct pollfd p = {.fd = ai_event, .events = POLLIN};
	CHECK(SYS(poll(&p, 1, 0)) == 1, "the eventfd does not tell of events");
	// What is read and sent again moves heads and tails, and must go round and round.
	int i = turn++ % AI_COUNT;
	unsigned n = ai[i].pending;
	ai_take(i, n);
	CHECK(ai_get(ai[i].ctx, 0, 1, &(struct io_event){0}) == 0, "context %d gives more events than there were", i);
	if (i == AI_FULL) {
		// All that is taken at once, which depends a little on the CPUs.
		unsigned k = ai_send(i, ai[i].nr);
		CHECK(k >= n / 2 && k < ai[i].nr, "the full context took %u of %u requests", k, ai[i].nr);
	} else {
		if (i == AI_EMPTY) {
			CHECK(ai_send(i, 3) == 3, "the empty context takes no requests");
			ai_take(i, 3);
		}
		CHECK(ai_send(i, n) == n, "context %d takes no more requests", i);
	}
	ai_note(i);
}

COMMAND(aioring) {
	ai_file = SYS(open(path_of("data"), O_RDWR | O_CREAT, 0600));
	CHECK(SYS(write(ai_file, ai_data, sizeof ai_data)) == sizeof ai_data, "write data");
	ai_event = SYS(eventfd(0, EFD_NONBLOCK));
	for (int i = 0; i < AI_COUNT; i++) {
		SYS(syscall(SYS_io_setup, i == AI_BIG ? 3000 : 5, &ai[i].ctx));
		if (i == AI_MOVED) {
			// The name of a context goes where its ring goes.
			char *to = SYS(mmap(NULL, 8192, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
			ai[i].ctx = (aio_context_t)SYS(mremap((void *)ai[i].ctx, 4096, 4096, MREMAP_MAYMOVE | MREMAP_FIXED, to + 4096));
		}
		ai[i].ring = (struct ring *)ai[i].ctx;
		ai[i].nr = ai[i].ring->nr;
	}
	// One context in the middle is gone: the kernel's own numbers have a hole.
	aio_context_t gone = 0;
	SYS(syscall(SYS_io_setup, 5, &gone));
	SYS(syscall(SYS_io_destroy, gone));
	ai_send(AI_FEW, 7);
	ai_take(AI_FEW, 2);
	ai_send(AI_FULL, ai[AI_FULL].nr);
	for (int k = 0; k < 3; k++) {
		ai_send(AI_AROUND, 50);
		if (k < 2) ai_take(AI_AROUND, 50);
	}
	CHECK(ai[AI_AROUND].ring->tail < ai[AI_AROUND].ring->head, "the ring did not go around");
	ai_send(AI_BIG, 2500);
	ai_take(AI_BIG, 1000);
	ai_send(AI_NOTIFY, 4);
	ai_send(AI_MOVED, 9);
	for (int i = 0; i < AI_COUNT; i++) ai_note(i);
	loop(ai_check);
	for (int i = 0; i < AI_COUNT; i++) {
		ai_take(i, ai[i].pending);
		SYS(syscall(SYS_io_destroy, ai[i].ctx));
	}
}

static void *ai_waiter(void *arg) {
	aio_context_t c = (aio_context_t)arg;
	struct io_event e;
	while (!stopping) {
		struct timespec t = {0, 200000000};
		long n = syscall(SYS_io_getevents, c, 1L, 1L, &e, &t);
		CHECK(n >= 0, "io_getevents: %s", strerror(errno));
		CHECK(n == 0, "io_getevents gave an event");
	}
	return NULL;
}

// aiowait: a thread waits for events that do not come.
COMMAND(aiowait) {
	aio_context_t c = 0;
	SYS(syscall(SYS_io_setup, 5, &c));
	pthread_t t = spawn(ai_waiter, (void *)c);
	loop(NULL);
	pthread_join(t, NULL);
}

static aio_context_t ai_busy;
static int ai_never;

static void ai_busy_check(void) {
	struct ring *r = (struct ring *)ai_busy;
	CHECK(r->head == 0 && r->tail == 2, "head %u and tail %u, want 0 and 2", r->head, r->tail);
	CHECK(r->events[0].data == 100 && r->events[1].data == 101, "events %lu and %lu", (long)r->events[0].data, (long)r->events[1].data);
}

// Its requests become ready when it ends.
COMMAND(aiobusy) {
	ai_never = SYS(eventfd(0, EFD_NONBLOCK));
	SYS(syscall(SYS_io_setup, 20, &ai_busy));
	for (int i = 0; i < 2; i++) {
		struct iocb b = {.aio_data = 100 + i, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = ai_never, .aio_buf = (uint64_t)ai_data, .aio_nbytes = 8};
		CHECK(ai_submit(ai_busy, &b) == 1, "read");
	}
	for (int i = 0; i < 3; i++) {
		struct iocb b = {.aio_data = 200 + i, .aio_lio_opcode = IOCB_CMD_POLL, .aio_fildes = ai_never, .aio_buf = POLLIN};
		CHECK(ai_submit(ai_busy, &b) == 1, "poll: %s", strerror(errno));
	}
	loop(ai_busy_check);
	uint64_t one = 1;
	SYS(write(ai_never, &one, sizeof one));
	struct io_event e[6];
	int n = syscall(SYS_io_getevents, ai_busy, 5L, 6L, e, NULL);
	CHECK(n == 5, "%d events, want 5", n);
	for (int i = 2; i < 5; i++) CHECK(e[i].data >= 200 && e[i].data < 203 && e[i].res == POLLIN, "event %d: %lu, %ld", i, (long)e[i].data, (long)e[i].res);
}

static pid_t ai_kid;
static void ai_child_check(void) { expect_alive(ai_kid); }

COMMAND(aiochild) {
	aio_context_t c = 0;
	SYS(syscall(SYS_io_setup, 5, &c));
	if ((ai_kid = child()) == 0)
		for (;;) {
			orphan_check();
			nap_ms(10);
		}
	loop(ai_child_check);
	end_child(ai_kid);
}
