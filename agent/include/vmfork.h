/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Was the virtual machine that this program runs in forked? Header only, C11 or C++11, gcc or clang, 64-bit Linux.
 *
 *     static vmfork_guard guard;              // zero-initialised is enough; vmfork_guard_init() binds it at once
 *
 *     vmfork_guard_init(&guard);
 *     if (vmfork_forked(&guard))
 *             make_new_keys();
 *
 * It reads the generation page of vmforkd, whose layout is stable (docs/generation-page.md), through one mapping per
 * source file that includes this header. A fork shows in the page when vmforkd has noticed it, which is after the
 * machine runs again: ask before and after making what a clone must not share, and throw it away if the second answer
 * is true. All functions are thread-safe and safe in children of fork(); none allocates or changes errno, and only
 * vmfork_read() can ever wait.
 *
 * VMFORK_ROOT in the environment names another root directory; set-user-ID programs ignore it.
 */
#ifndef VMFORK_H
#define VMFORK_H

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || __SIZEOF_POINTER__ < 8
#error "the generation page is read on 64-bit little-endian machines only"
#endif

/* glibc declares it for _GNU_SOURCE only, which a header must not demand of the program that includes it. */
#if !defined(__USE_GNU)
extern char *secure_getenv(const char *name);
#endif

#define VMFORK_PAGE_SIZE 4096

enum { VMFORK_SETTLED = 0, VMFORK_REACTING = 1, VMFORK_FAILED = 2 };
enum { VMFORK_NOBODY_WATCHES = 0, VMFORK_BY_TIMER = 1, VMFORK_BY_EVENT = 2 };

/* One consistent copy of the page. */
typedef struct vmfork_content {
	uint32_t state;          /* VMFORK_SETTLED, VMFORK_REACTING or VMFORK_FAILED */
	uint32_t detection;      /* VMFORK_NOBODY_WATCHES, VMFORK_BY_TIMER or VMFORK_BY_EVENT */
	uint64_t generation;     /* forks so far, plus one; clones reach the same numbers */
	uint64_t detected_at_ns; /* of the last fork: CLOCK_REALTIME, 0 if there was none; it may be stale */
	uint64_t boottime_ns;    /* of the last fork: CLOCK_BOOTTIME */
	unsigned char token[16]; /* of the last fork: different in every clone; not secret */
} vmfork_content;

/* What one part of a program saw last. Threads may share it: one of them is told. */
typedef struct vmfork_guard {
	const unsigned char *page;
	uint64_t seen;
} vmfork_guard;

/* The rest of this file is implementation up to each public function. */

static inline const unsigned char *vmfork_private_map(void)
{
	static const char name[] = "/run/vmfork/generation";
	const char *root = secure_getenv("VMFORK_ROOT");
	char path[4096];
	struct stat status;
	void *page = MAP_FAILED;
	int fd, length;

	length = snprintf(path, sizeof(path), "%s%s", root != NULL ? root : "", name);
	if (length < 0 || (size_t)length >= sizeof(path))
		return NULL;
#ifdef O_CLOEXEC
	fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
#else
	fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY);
#endif
	if (fd < 0)
		return NULL;
	/* A mapping longer than the file would be answered with SIGBUS. */
	if (fstat(fd, &status) == 0 && S_ISREG(status.st_mode) && status.st_size >= VMFORK_PAGE_SIZE)
		page = mmap(NULL, VMFORK_PAGE_SIZE, PROT_READ, MAP_SHARED, fd, 0);
	close(fd);
	if (page == MAP_FAILED)
		return NULL;
	/* Newer versions of the layout keep all fields of version 1. */
	if (memcmp(page, "VMFK", 4) != 0 || __atomic_load_n((const uint32_t *)page + 1, __ATOMIC_RELAXED) < 1) {
		munmap(page, VMFORK_PAGE_SIZE);
		return NULL;
	}
	return (const unsigned char *)page;
}

static inline const unsigned char *vmfork_private_page(void)
{
	static const unsigned char *shared;
	const unsigned char *page = __atomic_load_n(&shared, __ATOMIC_ACQUIRE);
	const unsigned char *none = NULL;
	int saved_errno;

	if (__builtin_expect(page != NULL, 1))
		return page;
	saved_errno = errno;
	page = vmfork_private_map();
	if (page != NULL &&
	    !__atomic_compare_exchange_n(&shared, &none, page, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
		munmap((void *)(uintptr_t)page, VMFORK_PAGE_SIZE);
		page = none;
	}
	errno = saved_errno;
	return page;
}

static inline uint32_t vmfork_private_u32(const unsigned char *page, unsigned offset)
{
	return __atomic_load_n((const uint32_t *)(const void *)(page + offset), __ATOMIC_RELAXED);
}

static inline uint64_t vmfork_private_u64(const unsigned char *page, unsigned offset)
{
	return __atomic_load_n((const uint64_t *)(const void *)(page + offset), __ATOMIC_RELAXED);
}

/* How often this machine was forked, plus one, as far as vmforkd noticed; 0 without a generation page. */
static inline uint64_t vmfork_generation(void)
{
	const unsigned char *page = vmfork_private_page();

	if (page == NULL)
		return 0;
	return __atomic_load_n((const uint64_t *)(const void *)(page + 16), __ATOMIC_ACQUIRE);
}

/* Whether there is a generation page and somebody watches for forks. */
static inline bool vmfork_supported(void)
{
	const unsigned char *page = vmfork_private_page();

	return page != NULL && vmfork_private_u32(page, 56) != VMFORK_NOBODY_WATCHES;
}

static inline bool vmfork_private_bind(vmfork_guard *guard)
{
	const unsigned char *page = vmfork_private_page();
	const unsigned char *none = NULL;
	uint64_t now, unseen = 0;

	if (page == NULL)
		return false;
	now = __atomic_load_n((const uint64_t *)(const void *)(page + 16), __ATOMIC_ACQUIRE);
	/* First what was seen, then the page: who meets the page finds a value to compare with. */
	__atomic_compare_exchange_n(&guard->seen, &unseen, now, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
	__atomic_compare_exchange_n(&guard->page, &none, page, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
	return true;
}

/* From now on vmfork_forked() tells forks. False while there is no page: vmfork_forked() then binds it later. */
static inline bool vmfork_guard_init(vmfork_guard *guard)
{
	guard->page = NULL;
	guard->seen = 0;
	return vmfork_private_bind(guard);
}

/*
 * True once for each fork since the guard was bound or last said so; several in between count as one. False without a
 * page, or when nobody watches: ask vmfork_supported() where that makes a difference.
 */
static inline bool vmfork_forked(vmfork_guard *guard)
{
	const unsigned char *page = __atomic_load_n(&guard->page, __ATOMIC_ACQUIRE);
	uint64_t now, seen;

	if (__builtin_expect(page == NULL, 0)) {
		vmfork_private_bind(guard);
		return false;
	}
	now = __atomic_load_n((const uint64_t *)(const void *)(page + 16), __ATOMIC_ACQUIRE);
	seen = __atomic_load_n(&guard->seen, __ATOMIC_RELAXED);
	if (__builtin_expect(now == seen, 1))
		return false;
	return __atomic_compare_exchange_n(&guard->seen, &seen, now, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}

/*
 * Copies all fields of the page as they were at one moment. Returns 0; ENOENT without a page; EAGAIN if an update did
 * not end within a quarter of a second, because vmforkd was stopped in the middle of one. Where it fails, the copy is not to be used.
 */
static inline int vmfork_read(vmfork_content *content)
{
	const unsigned char *page = vmfork_private_page();
	uint64_t token[2];
	uint32_t before, after;
	int attempt, saved_errno;

	memset(content, 0, sizeof(*content));
	if (page == NULL)
		return ENOENT;
	for (attempt = 0; attempt < 10250; attempt++) {
		if (attempt > 10000) {
			/* The writer was interrupted: it needs a CPU more than we do. */
			saved_errno = errno;
			poll(NULL, 0, 1);
			errno = saved_errno;
		}
		before = __atomic_load_n((const uint32_t *)(const void *)(page + 8), __ATOMIC_ACQUIRE);
		if (before & 1)
			continue;
		content->state = vmfork_private_u32(page, 12);
		content->generation = vmfork_private_u64(page, 16);
		content->detected_at_ns = vmfork_private_u64(page, 24);
		content->boottime_ns = vmfork_private_u64(page, 32);
		token[0] = vmfork_private_u64(page, 40);
		token[1] = vmfork_private_u64(page, 48);
		content->detection = vmfork_private_u32(page, 56);
		/* All loads above are done before seq is loaded again. */
		__atomic_thread_fence(__ATOMIC_ACQUIRE);
		after = vmfork_private_u32(page, 8);
		if (before == after) {
			memcpy(content->token, token, sizeof(content->token));
			return 0;
		}
	}
	return EAGAIN;
}

#ifdef __cplusplus
}
#endif

#endif
