// SPDX-License-Identifier: Apache-2.0
/*
 * The practical limit that vmforkd is measured against: waits for one line of the kernel's log and bumps one page.
 * No truth, no memory for a restart, no policy, nobody to tell. Usage: reference KMSG PAGE
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

static const char line[] = ";random: crng reseeded due to virtual machine fork\n";

static uint64_t now(clockid_t clock)
{
	struct timespec moment;

	clock_gettime(clock, &moment);
	return (uint64_t)moment.tv_sec * 1000000000u + (uint64_t)moment.tv_nsec;
}

static void bump(unsigned char *page)
{
	atomic_uint *seq = (atomic_uint *)(void *)(page + 8);
	atomic_ullong *generation = (atomic_ullong *)(void *)(page + 16);
	uint64_t times[2] = { now(CLOCK_REALTIME), now(CLOCK_BOOTTIME) };
	unsigned char token[16];

	if (getrandom(token, sizeof(token), 0) != (ssize_t)sizeof(token))
		return;
	atomic_fetch_add(seq, 1);
	atomic_fetch_add(generation, 1);
	memcpy(page + 24, times, sizeof(times));
	memcpy(page + 40, token, sizeof(token));
	atomic_fetch_add(seq, 1);
}

int main(int argc, char **argv)
{
	static char record[16385];
	struct pollfd wait = { .events = POLLIN };
	unsigned char *page;
	ssize_t size;
	int fd;

	if (argc != 3 || (fd = open(argv[2], O_RDWR | O_CREAT, 0644)) < 0 || ftruncate(fd, 4096) != 0)
		return 2;
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	wait.fd = open(argv[1], O_RDWR | O_NONBLOCK);
	if (page == MAP_FAILED || wait.fd < 0)
		return 1;
	memcpy(page, "VMFK\1\0\0\0", 8);
	page[16] = 1;
	while (poll(&wait, 1, -1) > 0) {
		while ((size = read(wait.fd, record, sizeof(record) - 1)) > 0) {
			record[size] = '\0';
			if (strtoul(record, NULL, 10) >> 3 == 0 && strstr(record, line) != NULL)
				bump(page);
		}
	}
	return 1;
}
