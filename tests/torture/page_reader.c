/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vmfork.h held to whatever may stand in the place of the generation page. Inputs come on standard input, each behind
 * its length in four bytes; a line is the answer to one that was read rightly, and what was not ends the program.
 *
 * An input's first byte says what stands there: a file of the other bytes as long as these, a whole page or more, or no
 * file at all. argv[1] is a directory to work in.
 */
#include <vmfork.h>

enum { AS_LONG, WHOLE, LONGER, ONE_SHORT, DIRECTORY, PIPE, DANGLING, DEVICE, INTERRUPTED, KINDS };

static char place[4096], page_path[4096], live_root[4096], odd_root[4096];

static void need(bool holds, const char *what)
{
	if (!holds) {
		fprintf(stderr, "page_reader: %s\n", what);
		abort();
	}
}

static void put(const char *path, const unsigned char *data, size_t size, off_t length)
{
	int fd = open(path, O_WRONLY | O_CREAT, 0644);

	need(fd >= 0 && write(fd, data, size) == (ssize_t)size && ftruncate(fd, length) == 0, "cannot write");
	close(fd);
}

static uint64_t number(const unsigned char *at, unsigned bytes)
{
	uint64_t value = 0;

	while (bytes-- > 0)
		value = value << 8 | at[bytes];
	return value;
}

/* What may be mapped, and what may not. */
static void whatever_stands_there(unsigned kind, const unsigned char *page, size_t size)
{
	const unsigned char *mapped;
	size_t length = kind == AS_LONG ? size : kind == LONGER ? 2 * VMFORK_PAGE_SIZE : VMFORK_PAGE_SIZE;
	bool good;

	setenv("VMFORK_ROOT", odd_root, 1);
	unlink(place);
	rmdir(place);
	if (kind == ONE_SHORT)
		length--;
	if (kind == DIRECTORY)
		need(mkdir(place, 0755) == 0, "no directory");
	else if (kind == PIPE)
		need(mkfifo(place, 0644) == 0, "no pipe");
	else if (kind == DANGLING)
		need(symlink("/nowhere/at/all", place) == 0, "no link");
	else if (kind == DEVICE)
		need(symlink("/dev/zero", place) == 0, "no link");
	else
		put(place, page, size, (off_t)length);
	good = (kind <= LONGER || kind == INTERRUPTED) && length >= VMFORK_PAGE_SIZE && memcmp(page, "VMFK", 4) == 0 &&
	       number(page + 4, 4) >= 1;
	mapped = vmfork_private_map();
	need((mapped != NULL) == good, good ? "a page is refused" : "what is no page is taken for one");
	if (mapped != NULL) {
		need(memcmp(mapped, page, size) == 0, "another page is mapped");
		munmap((void *)(uintptr_t)mapped, VMFORK_PAGE_SIZE);
	}
}

/* A page that is mapped already holds these bytes now. */
static void whatever_it_holds(unsigned kind, const unsigned char *page)
{
	vmfork_guard guard;
	vmfork_content content;
	unsigned char next[VMFORK_PAGE_SIZE];
	uint64_t generation = number(page + 16, 8);
	int result;

	put(page_path, page, VMFORK_PAGE_SIZE, VMFORK_PAGE_SIZE);
	errno = 77;
	need(vmfork_generation() == generation, "another generation");
	need(vmfork_supported() == (number(page + 56, 4) != 0), "another word on who watches");
	need(vmfork_guard_init(&guard) && !vmfork_forked(&guard), "a fork where none was");
	/* A reader gives a writer that may still be there a quarter of a second: only where that is meant to be tried. */
	if (page[8] % 2 == 0 || kind == INTERRUPTED) {
		result = vmfork_read(&content);
		need(result == (page[8] % 2 ? EAGAIN : 0), "another answer");
		if (result == 0)
			need(content.state == number(page + 12, 4) && content.generation == generation &&
				     content.detected_at_ns == number(page + 24, 8) &&
				     content.boottime_ns == number(page + 32, 8) &&
				     memcmp(content.token, page + 40, 16) == 0 &&
				     content.detection == number(page + 56, 4),
			     "another content");
	}
	need(errno == 77, "errno was changed");
	memcpy(next, page, sizeof(next));
	next[16]++;
	put(page_path, next, VMFORK_PAGE_SIZE, VMFORK_PAGE_SIZE);
	need(vmfork_forked(&guard) && !vmfork_forked(&guard), "a fork is not told once");
}

static void try_it(const unsigned char *data, size_t size)
{
	unsigned char page[VMFORK_PAGE_SIZE] = {0};
	unsigned kind = size > 0 ? data[0] % KINDS : WHOLE;
	size_t length = size > 0 ? size - 1 : 0;

	length = length < sizeof(page) ? length : sizeof(page) - (kind == ONE_SHORT);
	if (length > 0)
		memcpy(page, data + 1, length);
	whatever_stands_there(kind, page, length);
	whatever_it_holds(kind, page);
}

int main(int argc, char **argv)
{
	static unsigned char data[1 << 16], first[VMFORK_PAGE_SIZE] = "VMFK\1";
	uint32_t size;

	need(argc == 2, "a directory is missing");
	snprintf(odd_root, sizeof(odd_root), "%s/odd", argv[1]);
	snprintf(live_root, sizeof(live_root), "%s/live", argv[1]);
	snprintf(place, sizeof(place), "%.4000s/run/vmfork/generation", odd_root);
	snprintf(page_path, sizeof(page_path), "%.4000s/run/vmfork/generation", live_root);
	setenv("VMFORK_ROOT", live_root, 1);
	put(page_path, first, sizeof(first), sizeof(first));
	need(vmfork_generation() == 0 && vmfork_private_page() != NULL, "the first page is not mapped");
	while (fread(&size, sizeof(size), 1, stdin) == 1) {
		need(size <= sizeof(data) && fread(data, 1, size, stdin) == size, "an input is cut off");
		try_it(data, size);
		puts("fine");
		fflush(stdout);
	}
	return 0;
}
