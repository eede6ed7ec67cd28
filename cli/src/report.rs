//! What the program tells: lines for a reader, or with `--json` an object a line for other programs.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{json, Value};
use std::io::{self, IsTerminal, Write};
use std::process;
use std::time::{Duration, Instant};

/// Between two lines of progress where there is no terminal.
const EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy)]
pub struct Report {
    json: bool,
}

impl Report {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Tells an event: a line, or its name and values.
    pub fn tell(self, line: impl AsRef<str>, event: &str, values: Value) {
        if self.json {
            show(&format!("{}\n", object(event, values)));
        } else {
            show(&format!("{}\n", line.as_ref()));
        }
    }

    /// Shows a reader a part of a line.
    pub fn piece(self, text: &str) {
        if !self.json {
            show(text);
        }
    }

    /// Whether lines for a reader are shown.
    pub fn is_read(self) -> bool {
        !self.json
    }

    /// The progress of `what`, which has `len` steps.
    pub fn progress(self, what: &'static str, len: u64) -> Progress {
        let bar = ProgressBar::new(len).with_prefix(what);
        let terminal = !self.json && io::stderr().is_terminal();
        if !terminal {
            bar.set_draw_target(ProgressDrawTarget::hidden());
        }
        Progress { report: self, bar, terminal, told: None, began: Instant::now(), first: 0 }
    }
}

/// To the standard output. Where nobody reads it any more, as after `| head`, the program ends as others do.
pub fn show(text: &str) {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => process::exit(141),
        Err(error) => {
            eprintln!("error: the standard output: {error}");
            process::exit(1);
        }
    }
}

fn object(event: &str, values: Value) -> Value {
    let mut object = json!({ "event": event });
    if let (Value::Object(all), Value::Object(values)) = (&mut object, values) {
        all.extend(values);
    }
    object
}

/// A bar in a terminal, else a line now and then.
pub struct Progress {
    report: Report,
    bar: ProgressBar,
    terminal: bool,
    told: Option<Instant>,
    began: Instant,
    first: u64,
}

impl Progress {
    /// In steps, with a loss.
    pub fn of_steps(self) -> Self {
        self.styled("{prefix:>12} {bar:30} step {pos}/{len}{msg}")
    }

    /// In bytes.
    pub fn of_bytes(self) -> Self {
        self.styled("{prefix:>12} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")
    }

    fn styled(self, template: &str) -> Self {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.bar.set_style(style);
        }
        self
    }

    /// Starts after `done` steps.
    pub fn start(&mut self, done: u64) {
        self.bar.set_position(done);
        (self.first, self.began) = (done, Instant::now());
    }

    pub fn bytes(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
    }

    /// After a step: the mean loss of the last ones, and tokens a second.
    pub fn step(&mut self, done: u64, loss: f64, mean: f64, speed: f64) {
        let total = self.bar.length().unwrap_or(done);
        let each = self.began.elapsed().as_secs_f64() / (done - self.first).max(1) as f64;
        let left = Duration::from_secs_f64(each * (total - done.min(total)) as f64);
        let rest = format!(", mean loss {mean:.3}, {speed:.0} tokens/s, {} left", minutes(left));
        self.bar.set_message(rest.clone());
        self.bar.set_position(done);
        if self.report.json {
            let values = json!({
                "step": done, "of": total, "loss": loss, "tokens_per_second": speed,
                "seconds_left": left.as_secs_f64(),
            });
            show(&format!("{}\n", object("step", values)));
        } else if !self.terminal {
            let due = self.told.is_none_or(|told| told.elapsed() >= EVERY);
            if due || done == total {
                show(&format!("{} {done}/{total}{rest}\n", self.bar.prefix()));
                self.told = Some(Instant::now());
            }
        }
    }

    /// Does what prints in between.
    pub fn suspend<T>(&self, run: impl FnOnce() -> T) -> T {
        self.bar.suspend(run)
    }

    pub fn finish(&self) {
        self.bar.finish();
    }
}

fn minutes(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match seconds / 60 {
        0 => format!("{seconds} s"),
        minutes if minutes < 60 => format!("{minutes} min {} s", seconds % 60),
        minutes => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}
