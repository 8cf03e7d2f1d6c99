// SPDX-License-Identifier: Apache-2.0
/*
 * The steps of vmforkd from the edge to the page, in C: every system call that it makes, in its order, on files like
 * its own. What is left between the two is the interpreter. No policy, no errors, nobody to tell, and the token is
 * mixed by XOR instead of BLAKE2b. Usage: same GUID DEVICES NOTE KMSG PAGE, where GUID is replaced by rename.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OFFSET = 40, ID = 16 };

static const char line[] = ";random: crng reseeded due to virtual machine fork\n";
static const char *guid, *devices;
static unsigned char *page;
static int page_file, note;

static uint64_t now(clockid_t clock)
{
	struct timespec moment;

	clock_gettime(clock, &moment);
	return (uint64_t)moment.tv_sec * 1000000000u + (uint64_t)moment.tv_nsec;
}

static int read_id(unsigned char id[ID])
{
	unsigned char blob[OFFSET + ID];
	int fd = open(guid, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
	ssize_t size = fd < 0 ? -1 : pread(fd, blob, sizeof(blob), 0);

	if (fd >= 0)
		close(fd);
	memcpy(id, blob + OFFSET, ID);
	return size == (ssize_t)sizeof(blob) ? 0 : -1;
}

static void barrier(void)
{
	char byte;

	if (pread(page_file, &byte, 1, 0) != 1)
		abort();
}

static void publish(const unsigned char id[ID])
{
	atomic_uint *seq = (atomic_uint *)(void *)(page + 8);
	atomic_ullong *generation = (atomic_ullong *)(void *)(page + 16);
	uint64_t times[2] = { now(CLOCK_REALTIME), now(CLOCK_BOOTTIME) };
	unsigned char token[32];
	char text[1024], hex[2 * ID + 1];
	int size;

	if (getrandom(token, sizeof(token), 0) != (ssize_t)sizeof(token))
		return;
	if (access("/dev/hwrng", R_OK) == 0)
		token[0] ^= 1;
	for (int i = 0; i < ID; i++) {
		token[i] ^= id[i] ^ ((unsigned char *)times)[i];
		snprintf(hex + 2 * i, 3, "%02x", id[i]);
	}
	size = snprintf(text, sizeof(text),
			"{\"boot_id\":\"-\",\"generation\":%llu,\"generation_id\":\"%s\",\"detected_at_ns\":%llu,"
			"\"boottime_ns\":%llu,\"truths\":{\"generation_id\":\"%s\"},\"credits\":{}}\n",
			atomic_load(generation) + 1, hex, (unsigned long long)times[0],
			(unsigned long long)times[1], hex);
	if (pwrite(note, text, (size_t)size, 0) != size)
		return;
	atomic_fetch_add(seq, 1);
	barrier();
	atomic_fetch_add(generation, 1);
	memcpy(page + 24, times, sizeof(times));
	memcpy(page + 40, token, 16);
	barrier();
	atomic_fetch_add(seq, 1);
}

static void drain(struct pollfd *wait)
{
	static char record[16385];
	static unsigned char last[ID];
	unsigned char first[ID], second[ID];
	struct stat status;
	ssize_t size;
	int words = 0;

	if (poll(wait, 1, 0) <= 0)
		return;
	do {
		size = read(wait->fd, record, sizeof(record) - 1);
		if (size <= 0)
			return;
		record[size] = '\0';
		words += strtoul(record, NULL, 10) >> 3 == 0 && strstr(record, line) != NULL;
	} while (poll(wait, 1, 0) > 0);
	if (stat(devices, &status) != 0 || read_id(first) != 0 || read_id(second) != 0)
		return;
	if (words && memcmp(first, second, ID) == 0 && memcmp(first, last, ID) != 0) {
		memcpy(last, first, ID);
		publish(first);
	}
}

int main(int argc, char **argv)
{
	struct epoll_event ready, interest = { .events = EPOLLIN };
	struct pollfd wait = { .events = POLLIN };
	int loop = epoll_create1(EPOLL_CLOEXEC);

	if (argc != 6 || loop < 0 || (page_file = open(argv[5], O_RDWR | O_CREAT, 0644)) < 0 ||
	    ftruncate(page_file, 4096) != 0)
		return 2;
	guid = argv[1];
	devices = argv[2];
	note = open(argv[3], O_WRONLY | O_CREAT, 0600);
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, page_file, 0);
	wait.fd = open(argv[4], O_RDWR | O_NONBLOCK);
	if (page == MAP_FAILED || note < 0 || wait.fd < 0 || epoll_ctl(loop, EPOLL_CTL_ADD, wait.fd, &interest) != 0)
		return 1;
	memcpy(page, "VMFK\1\0\0\0", 8);
	page[16] = 1;
	while (epoll_wait(loop, &ready, 1, -1) > 0)
		drain(&wait);
	return 1;
}
