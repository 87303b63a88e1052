import threading

from bdl_train.tracking.worker import Worker


def test_calls_are_made_in_order_on_a_thread_of_their_own():
    seen, worker = [], Worker("test")
    for i in range(100):
        worker.put(lambda i=i: seen.append((i, threading.current_thread().name)))
    assert worker.wait(10)
    assert seen == [(i, "test") for i in range(100)]
    worker.close()


def test_after_the_first_that_raises_the_others_are_dropped_and_waiting_ends():
    seen, worker = [], Worker("test")
    worker.put(lambda: seen.append(1))
    worker.put(lambda: 1 // 0)
    worker.put(lambda: seen.append(2))
    assert worker.wait(10)
    assert seen == [1]
    assert isinstance(worker.error, ZeroDivisionError)
    worker.close()


def test_a_call_to_exit_ends_nothing():
    worker = Worker("test")
    worker.put(lambda: exec("raise SystemExit(3)"))
    assert worker.wait(10)
    assert isinstance(worker.error, SystemExit)
    worker.close()


def test_a_call_that_hangs_holds_up_neither_put_nor_wait_and_too_many_behind_it_are_an_error():
    free, worker = threading.Event(), Worker("test", most_waiting=3)
    worker.put(free.wait)
    assert not worker.wait(0.01)
    for _ in range(5):
        worker.put(lambda: None)
    assert "3 calls wait" in str(worker.error)
    free.set()
    assert worker.wait(10)
    worker.close()
