/* Opens TCP connections one after the other and closes each by a reset, so that no end waits in TIME_WAIT.
 *
 *     connections serve ADDRESS PORT CPU                  accepts and closes until killed
 *     connections open ADDRESS PORT MILLISECONDS CPU      prints how many there were, how many failed, and what
 *                                                         they took in nanoseconds: of the clock and of the CPU
 *     connections turns COUNT EACH [NAMESPACE ADDRESS PORT]... CPU
 *                                                         COUNT rounds, in each of them EACH connections to every
 *                                                         address from its namespace, another first each time;
 *                                                         prints of each turn: whose, failed, both nanoseconds
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BACKLOG 4096
#define BETWEEN_LOOKS 16
#define MOST_CASES 64

static const struct linger at_once = {.l_onoff = 1, .l_linger = 0};

static void fail(const char *what)
{
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static void stay_on(int cpu)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        fail("sched_setaffinity");
}

static socklen_t read_address(const char *text, int port, struct sockaddr_storage *address)
{
    struct sockaddr_in *v4 = (struct sockaddr_in *)address;
    struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)address;
    memset(address, 0, sizeof *address);
    if (inet_pton(AF_INET, text, &v4->sin_addr) == 1) {
        v4->sin_family = AF_INET;
        v4->sin_port = htons(port);
        return sizeof *v4;
    }
    if (inet_pton(AF_INET6, text, &v6->sin6_addr) != 1)
        fail(text);
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(port);
    return sizeof *v6;
}

static void serve(const struct sockaddr_storage *address, socklen_t length)
{
    int yes = 1, listener = socket(address->ss_family, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (const struct sockaddr *)address, length) || listen(listener, BACKLOG))
        fail("listen");
    puts("listening");
    fflush(stdout);
    for (;;) {
        int accepted = accept(listener, NULL, NULL);
        if (accepted >= 0)
            close(accepted);
        else if (errno != ECONNABORTED && errno != EINTR)
            fail("accept");
    }
}

static long long now(clockid_t clock)
{
    struct timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static int open_one(const struct sockaddr_storage *address, socklen_t length)
{
    int connection = socket(address->ss_family, SOCK_STREAM, 0);
    if (connection < 0)
        fail("socket");
    setsockopt(connection, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    int refused = connect(connection, (const struct sockaddr *)address, length);
    close(connection);
    return refused;
}

static void open_many(const struct sockaddr_storage *address, socklen_t length, long milliseconds)
{
    long long begun = now(CLOCK_MONOTONIC), end = begun + milliseconds * 1000000LL, time = begun;
    long opened = 0, failed = 0;
    while (time < end) {
        for (int i = 0; i < BETWEEN_LOOKS; i++) {
            if (open_one(address, length))
                failed++;
            else
                opened++;
        }
        time = now(CLOCK_MONOTONIC);
    }
    printf("%ld %ld %lld %lld\n", opened, failed, time - begun, now(CLOCK_PROCESS_CPUTIME_ID));
}

static void take_turn(int number, const struct sockaddr_storage *address, socklen_t length, long each)
{
    long failed = 0;
    long long clock = now(CLOCK_MONOTONIC), cpu = now(CLOCK_PROCESS_CPUTIME_ID);
    for (long i = 0; i < each; i++)
        failed += open_one(address, length) != 0;
    long long took = now(CLOCK_PROCESS_CPUTIME_ID) - cpu;
    printf("%d %ld %lld %lld\n", number, failed, now(CLOCK_MONOTONIC) - clock, took);
}

static void take_turns(long rounds, long each, int cases, char **words)
{
    struct sockaddr_storage address[MOST_CASES];
    socklen_t length[MOST_CASES];
    int namespace[MOST_CASES];
    if (cases > MOST_CASES)
        exit(2);
    for (int i = 0; i < cases; i++, words += 3) {
        namespace[i] = open(words[0], O_RDONLY | O_CLOEXEC);
        if (namespace[i] < 0)
            fail(words[0]);
        length[i] = read_address(words[1], atoi(words[2]), &address[i]);
    }
    for (long round = 0; round < rounds; round++)
        for (int i = 0; i < cases; i++) {
            int number = (i + round) % cases;
            if (setns(namespace[number], CLONE_NEWNET))
                fail("setns");
            take_turn(number, &address[number], length[number], each);
        }
}

int main(int count, char **words)
{
    struct sockaddr_storage address;
    if (count < 5)
        return 2;
    if (strcmp(words[1], "turns") == 0) {
        stay_on(atoi(words[count - 1]));
        take_turns(atol(words[2]), atol(words[3]), (count - 5) / 3, words + 4);
        return 0;
    }
    socklen_t length = read_address(words[2], atoi(words[3]), &address);
    stay_on(atoi(words[count - 1]));
    if (strcmp(words[1], "serve") == 0)
        serve(&address, length);
    else
        open_many(&address, length, atol(words[4]));
    return 0;
}
