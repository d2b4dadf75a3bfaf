//! A panic of a core is a complaint like any other: caught, with its place, and told with its seed.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// `None`: not in a simulation. `Some`: the last panic of this one.
    static LAST: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `f`; a panic in it comes back as a sentence.
pub fn catch<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let mine = LAST.with(|last| match &mut *last.borrow_mut() {
                Some(text) => {
                    *text = info.to_string().replace('\n', " ");
                    true
                }
                None => false,
            });
            if !mine {
                before(info);
            }
        }));
    });
    LAST.with(|last| *last.borrow_mut() = Some(String::new()));
    let result = panic::catch_unwind(AssertUnwindSafe(f));
    let text = LAST.with(|last| last.borrow_mut().take()).unwrap_or_default();
    result.map_err(|_| text)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_panic_comes_back_with_its_place() {
        let words = super::catch(|| panic!("the sky falls")).unwrap_err();
        assert!(words.contains("the sky falls") && words.contains("panics.rs"), "{words}");
        assert_eq!(super::catch(|| 7), Ok(7));
    }
}
